from sorahpc.jobs.tiny import gang


def run(config, task):
    gang(config, task)


def profile(config, task):
    gang(config, task)
