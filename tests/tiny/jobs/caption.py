from sorahpc.jobs.tiny import array


def run(config, task):
    array(config, task, 4)
