"""What an answer must be, how items and the table are kept, and which clips get their detailed caption."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sorahpc.config import Config
from sorahpc.configfile import parse_config
from sorahpc.data.captions import (
    CAPTIONS,
    Attempt,
    Item,
    Row,
    caption_settings,
    instruction_of,
    item_path,
    judge,
    known_items,
    merge,
    read_captions,
    read_item,
    with_captions,
    write_captions,
    write_item,
)
from sorahpc.data.manifest import MANIFEST, Rows, Video, open_manifest, write_manifest
from sorahpc.errors import ConfigError, DataError

# What models say instead of a caption, apostrophes straight and curly.
REFUSALS = [
    "I'm sorry, but I can't help with describing this video because it may contain people.",
    "I’m sorry, I can’t assist with that request. Please share something else with me instead.",
    "I am very sorry, but the frames that you have sent are too dark for me to describe them.",
    "Sorry, I cannot describe this clip. It may show a private person who did not agree to it.",
    "Sorry about that, the frames did not load on my side, so there is nothing to describe here.",
    "I apologize, but as a text-based model, I cannot view the frames that you speak of here.",
    "My apologies, but the video could not be opened and so no description can be given of it.",
    "Apologies for the confusion, but nothing can be seen in the frames that you have provided.",
    "I cannot provide a description of this clip, since it would be against my guidelines.",
    "I can't identify the people in these frames, and so I will not describe them any further.",
    "I can’t see any video here. If you describe its content, a caption can be written for it.",
    "I could not find anything in the frames that could be described in the way that you asked.",
    "I don't have the ability to watch videos, but I can help with text that you provide.",
    "I do not feel comfortable describing this scene, which seems to show somebody being hurt.",
    "I won't describe this clip since it appears to contain content of a violent nature.",
    "I'm unable to view videos or images directly, so I can't describe what happens in them.",
    "I am not able to see the frames. Could you tell me what happens in the clip instead?",
    "I need more information about the clip before a detailed caption can be written for it.",
    "As an AI language model, I do not have the ability to watch a video and describe it.",
    "As an AI, it is not possible for me to view this content, so no caption can be given.",
    "As a language model my abilities are limited to text, and this clip needs to be watched.",
    "A red ball rolls to the left. As an AI model, I can't tell what the weather was like there.",
    "The short caption is vague. I'm just an AI, so the rest has to be left to your imagination.",
    "Unfortunately, the frames are not available to me, so that a caption can't be written.",
    "Unfortunately I am not able to process the request at this time. Please try again later.",
    "We cannot process this content since our policies do not allow it. Please try another one.",
    "This request violates our content policy, and therefore no caption will be written for it.",
    "The content of this video is inappropriate, so that it will not be described in any detail.",
    "There is no video provided with this message. Send the frames again and ask once more then.",
    "No frames were provided with the question, therefore nothing about the clip can be said.",
    "It seems that you have not attached any frames to your message, so nothing can be described.",
    "It looks like there is a problem with the video, as all its frames are black or missing.",
    "It appears the video is missing from the message, so that nothing can be described here.",
    "Please provide the frames of the clip, and then a detailed caption can be written for them.",
    "The image is not available, so I cannot provide a detailed caption for the clip that you sent.",
    "I regret to inform you that I cannot create a caption, since the frames are not readable at all.",
    "This content may violate our usage policies. If you believe this is an error, please contact us.",
    "We're sorry, but something went wrong while we processed your request. Please try again later.",
    "My apologies, I'm having trouble with seeing the frames. Can you send them again in another way?",
    "Could you please share the video itself? The short caption alone is not enough for this.",
    "抱歉，我无法看到您所提到的视频画面，因此不能根据它来写出详细的描述。如果您能用文字告诉我更多内容，我会很乐意帮您继续完善。",
    "很抱歉，作为一个AI语言模型，我不能查看视频，也不能描述其中的人物，请您提供更多关于这段视频的文字信息，谢谢您的理解与支持。",
    "我无法根据提供的画面生成描述，因为这些画面不够清楚，请重新上传更清晰的视频，我会尽快为您写出一段完整而详细的文字说明。",
    "申し訳ありませんが、この動画の内容を説明することはできません。別の動画を提供していただければ、喜んで詳しい説明を書かせていただきます。",
    "죄송하지만 제공된 프레임만으로는 영상의 내용을 자세히 설명할 수 없습니다. 다른 영상을 올려 주세요.",
    "作为人工智能助手，我没有办法看到视频中的画面，请您用文字描述其中的人物、动作和场景，我会根据您的描述写出一段完整而详细的说明。",
    "作為一個大型語言模型，我沒有辦法看到影片中的畫面，請您用文字描述其中的人物、動作和場景，我會根據您的描述寫出一段完整的說明。",
    "미안하지만 이 영상의 장면을 볼 수 없기 때문에 자세한 설명을 쓸 수 없습니다. 다른 영상을 올려 주세요.",
    "Es tut mir leid, aber ich kann zu diesem Video keine Beschreibung verfassen, da die Bilder nicht zu sehen sind.",
    "Leider kann ich die Bilder nicht ansehen und darum auch nicht sagen, was sich in diesem Video bewegt und wohin.",
    "Désolé, je ne peux pas décrire cette vidéo, car les images que vous avez envoyées ne me sont pas accessibles.",
    "Lo siento, pero no puedo describir este video porque no tengo acceso a los fotogramas que usted ha mencionado.",
    "Desculpe, mas não posso descrever este vídeo, pois não tenho acesso aos quadros que foram mencionados acima.",
    "Mi dispiace, ma non posso descrivere questo video perché i fotogrammi che ha indicato non sono disponibili.",
    "Извините, но я не могу описать это видео, так как у меня нет доступа к кадрам, о которых идёт речь в запросе.",
]
CHATTER = [
    "Sure! Here is a detailed caption: A red ball rolls slowly over the wet grass to the left.",
    "Certainly, a red ball rolls over the wet grass, to the left, while the camera stays still.",
    "Of course! A red ball rolls over the wet grass, to the left, while the camera stays still.",
    "Here's a detailed description of the clip: a red ball rolls over wet grass in the morning.",
    "Here is the caption you asked for. A red ball rolls over the wet grass in the morning light.",
    "Below is an expanded version of the short caption: a red ball rolls over the wet grass.",
    "The following is a detailed caption. A red ball rolls over the wet grass, to the left side.",
    "This is a detailed description of the clip: a red ball rolls over the wet grass, to the left.",
    "Okay, so the clip shows a red ball, which rolls over the wet grass, to the left, in the sun.",
    "Thank you for the frames. They show a red ball that rolls over the wet grass to the left.",
    "Based on the frames, a red ball rolls over the wet grass, to the left, in the morning light.",
    "Based on the provided images, a red ball rolls over the wet grass, to the left, in the sun.",
    "I see a red ball that rolls over the wet grass, to the left, while the camera stays still.",
    "I'd describe it as a red ball that rolls over the wet grass to the left in the morning sun.",
    "I will describe the clip now: a red ball rolls over the wet grass, to the left, in the sun.",
    "As requested, a red ball rolls over the wet grass, to the left, while the camera stays still.",
    "Let me describe the clip: a red ball rolls over the wet grass, to the left, in morning light.",
    "Hello! Please upload the video frames that you would like me to describe in a detailed manner.",
    "Here you go: a red ball rolls over the wet grass, to the left, while the camera stays still.",
    "We can see a red ball that rolls over the wet grass, to the left, while the camera stays still.",
    "Great! A red ball rolls over the wet grass, to the left, while the camera does not move at all.",
]
# Captions that come near those without being one.
CAPTIONS_OF_PEOPLE = [
    'A man in a grey suit says "I\'m sorry" to a crying child, kneeling beside her on a wet pavement at night.',
    "A neon sign reads I CAN'T STOP above a crowded bar; people in dark coats walk past, and rain runs down the glass.",
    "An AI robot made of white plastic waves its arm at visitors of a trade fair, while the camera circles around it.",
    "A woman is unable to open a heavy wooden door and leans against it with her shoulder; snow falls behind her.",
    "Here comes a steam train: black, with red wheels, it rolls out of the fog and passes to the left.",
    "Okay signs are made with both hands by a diver in a yellow suit, deep under water, as small fish swim by him.",
    "Great waves break over a stone pier in a storm, white foam flies high, and a lighthouse blinks in the background.",
    "Sure-footed goats climb a steep cliff in bright sun, while small stones fall and dust rises beneath their hooves.",
    "No people are visible on a wide beach at dawn; gentle waves roll in, and the camera glides slowly over the sand.",
    "There are no cars on the long straight road through the desert; heat shimmers above it as the camera flies along.",
    "Icebergs drift past a red ship in calm blue water, the low sun glitters, and the camera pans slowly to the right.",
    "In a kitchen with white tiles, a woman in a blue apron kneads dough on a wooden table, flour dust in the light.",
    "Apologetic and small, a wet brown dog sits in front of a broken vase, looks up at the camera and then looks away.",
    "Certain parts of the engine glow orange in the dark workshop as sparks fly from a grinder in a man's hands.",
    "It is raining on a narrow street at night; a boy with a yellow umbrella runs from left to right through puddles.",
    "Please-do-not-touch signs stand before a marble statue; visitors with phones walk around it in soft museum light.",
    "We-shaped balloons, silver and shining, rise above a wedding party on a lawn, and guests point up at the sky.",
    "The request stop of a country bus: an old man raises his hand, the red bus slows down and halts in front of him.",
    "The image of a full moon trembles on a black lake; a swan swims through it from the right, drawing long ripples.",
    "A very, very, very small kitten with grey stripes tumbles over a ball of blue wool on a carpet by a lamp.",
    "We Are Open hangs on a sign in a shop window, and a woman in an apron turns it around as people walk past.",
    "Certainly the largest of the herd, an elephant with one broken tusk crosses a shallow river in the low sun.",
    "OK is spelled with stones on a sandy beach; the tide comes in and washes the letters away, one after another.",
    "It looks like rain over the harbour: dark clouds move in from the left as sailors tie down their small boats.",
    "This is a close-up of a bee on a purple flower, its wings catching the light as it crawls from left to right.",
    "I-beams of rusted steel lie stacked in a yard while a crane lifts one of them slowly against a grey sky.",
    "A note on a fridge reads: let me know (in red); a hand takes it down, and I Have A Dream plays on the radio.",
    "Let's Dance is written in glowing letters on the wall behind a couple who spin slowly under a mirror ball.",
    "一只红色的小球在潮湿的草地上慢慢地向左滚动，清晨的阳光照在露珠上，远处有一排高大的树木，镜头保持静止不动，"
    "画面色调温暖柔和，背景略微模糊。",
    "Ein roter Ball rollt langsam über nasses Gras nach links; die Morgensonne glänzt in den Tropfen, die Kamera ruht.",
    "赤いボールが濡れた芝生の上をゆっくりと左へ転がっていく。朝の光が露に輝き、カメラは静止したまま、背景の木々は柔らかくぼけている。",
    "Красный мяч медленно катится влево по мокрой траве; утреннее солнце блестит в каплях росы, камера неподвижна.",
    "Leidenschaftlich tanzt ein Paar in roten Kleidern über einen Platz; Menschen stehen im Kreis und klatschen.",
    "Désolée et déserte, une plage grise s'étend sous la pluie; un chien court vers la gauche, la caméra le suit.",
    "Una mujer dice lo siento a un niño que llora; se arrodilla a su lado sobre la acera mojada y le da un pañuelo.",
    "作为背景的Dubai天际线在夕阳下闪闪发光，一辆红色跑车沿着海滨公路飞驰而过，镜头从空中缓缓跟随，海浪轻轻拍打着沙滩，远处有几只海鸥。",
    "抱歉地低下头的男孩站在教室门口，阳光从窗外洒进来，照亮了他的书包，镜头缓缓向他推近，背景里同学们小声交谈着，黑板上写满了字。",
    "申し訳なさそうに頭を下げる男性が、雨の降る夜の街角に立っている。濡れたスーツが街灯の光を反射し、カメラはゆっくりと引いていく。",
    "すみませんと言いながら女性が人混みをかき分けて進む。駅のホームは混雑していて、電車の光が窓に映り込み、カメラは彼女を追いかける。",
    "미안한 표정을 지은 남자가 비 내리는 거리에서 고개를 숙이고, 카메라는 천천히 다가간다.",
    "미안마의 황금빛 사원이 저녁 햇살에 빛난다. 승려들이 천천히 걸어가고 카메라는 올라간다.",
    "一个男孩低着头对母亲说抱歉，母亲蹲下身来抱住他，窗外的雨水顺着玻璃缓缓流下，房间里的灯光温暖而柔和，镜头慢慢地向他们推近。",
]
GOOD = "A red ball rolls slowly over wet grass to the left; drops shine in the low sun, and the camera stays still."


def verdict(answer: str, original: str = "a red ball", low: int = 40, high: int = 400) -> str:
    """The kind of the reason, or ""."""
    caption, reason = judge(answer, original, low, high)
    assert bool(caption) != bool(reason)
    return reason.split(":")[0]


@pytest.mark.parametrize("answer", REFUSALS)
def test_a_refusal_is_rejected(answer: str) -> None:
    assert verdict(answer) == "refusal"


@pytest.mark.parametrize("answer", CHATTER)
def test_an_answer_that_speaks_to_the_reader_is_rejected(answer: str) -> None:
    assert verdict(answer) == "chatter"


@pytest.mark.parametrize("answer", CAPTIONS_OF_PEOPLE)
def test_a_caption_that_only_comes_near_is_taken_as_it_is(answer: str) -> None:
    assert judge(answer, "something", 40, 400) == (answer, "")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("", "empty"),
        (" \n\t ", "empty"),
        ('""', "empty"),
        ("A red ball.", "length"),
        (GOOD * 5, "length"),
        (f"# A heading\n{GOOD}", "markup"),
        (f"- {GOOD}", "markup"),
        (f"First line.\n1. {GOOD}", "markup"),
        (f"**Ball.** {GOOD}", "markup"),
        (f"```\n{GOOD}\n```", "markup"),
        (f"{GOOD}<|im_end|>", "markup"),
        (f"{GOOD}</s>", "markup"),
        (f"<script>alert(1)</script>{GOOD}", "markup"),
        (f"<think>It is red, {GOOD}", "markup"),
        (f'{{"caption": "{GOOD}"}}', "markup"),
        (f'["{GOOD}"]', "markup"),
        (f"| subject | ball |\n| what it does | {GOOD} |", "markup"),
        (f"{GOOD}\n\nNote: I kept every fact of the short caption.", "chatter"),
        (f"{GOOD}\n\nLet me know if you want it shorter!", "chatter"),
        (f"{GOOD} (22 words)", "chatter"),
        (f"{GOOD}\0", "control character"),
        (f"{GOOD}\x1b[31m", "control character"),
        (f"{GOOD}\ud800", "control character"),
        (f"{GOOD}\u202e", "control character"),
        (f"{GOOD}\ufffd", "not text"),
        ("0101 1100 1010 0011 1111 0000 1010 0101 1100 1010 0011", "not text"),
        ("!?#%&! " * 10, "not text"),
        ("ball " * 30, "repetition"),
        ("A red ball rolls and rolls and rolls and rolls and rolls and rolls and rolls over it.", "repetition"),
        ("the red ball the red ball the red ball the red ball the red ball", "repetition"),
        (f"{GOOD} {GOOD}", "repetition"),
        ("红色的球滚动红色的球滚动红色的球滚动红色的球滚动红色的球滚动红色的球滚动红色的球滚动红色的球", "repetition"),
        ("A  RED ball, rolls over the green grass, under a blue sky!", "unchanged"),
    ],
)
def test_what_is_no_caption_is_rejected_by_kind(answer: str, kind: str) -> None:
    assert verdict(answer, "a red ball rolls over the green grass under a blue sky") == kind


@pytest.mark.parametrize(
    "answer",
    [
        f"  {GOOD}\n",
        f'"{GOOD}"',
        f"“{GOOD}”",
        f"Caption: {GOOD}",
        f'Detailed caption: "{GOOD}"',
        f"Answer: {GOOD}",
        f"Assistant:\n{GOOD}",
        GOOD.replace(" to the", "\nto the"),
        f"<think>\nThe ball is red.\nSure, here I go.\n</think>\n\n{GOOD}",
    ],
)
def test_wrapping_is_taken_off(answer: str) -> None:
    assert judge(answer, "a red ball", 40, 400) == (GOOD, "")


def test_judging_the_longest_answer_takes_no_time() -> None:
    import time

    start = time.monotonic()
    for text in ("a " * 10_000, "<think>" * 3_000, "i'm " * 5_000, "<|" * 10_000, "x" * 20_000, "\n" * 20_000 + "- x"):
        judge(text, "x", 1, 20_000)
    assert time.monotonic() - start < 20


# ---------------------------------------------------------------------------------------------------------------------


def make_item(subject: str = "0" * 16, caption: str = GOOD, original: str = "a red ball", frames: int = 0) -> Item:
    attempts = (Attempt(1, 0.0, "I'm sorry\0\ud800", "refusal"), Attempt(2, 0.7, caption, ""))
    sha = (subject * 4)[:64]
    return Item(sha, subject, original, frames, "ask", {"id": "m"}, caption, "" if caption else "refusal", attempts)


def test_an_item_reads_back_as_it_was_and_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    item = make_item()
    assert write_item(tmp_path, item) == item == read_item(tmp_path, item.sha256)
    assert write_item(tmp_path, dataclasses.replace(item, caption="another")) == item
    assert known_items(tmp_path) == {item.sha256}
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"{item.sha256}.json"]
    assert known_items(tmp_path / "nowhere") == set()


def test_what_a_killed_writer_leaves_is_no_item(tmp_path: Path) -> None:
    path = item_path(tmp_path, "ab" * 32)
    path.parent.mkdir()
    path.with_name(f".{path.name}.host.1.tmp").write_text('{"format"')
    assert known_items(tmp_path) == set()


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: "",
        lambda d: json.dumps(d)[:50],
        lambda d: "[]",
        lambda d: json.dumps(d | {"format": 2}),
        lambda d: json.dumps(d | {"more": 1}),
        lambda d: json.dumps(d | {"sha256": "f" * 64}),
        lambda d: json.dumps(d | {"caption": ""}),
        lambda d: json.dumps(d | {"caption": 7}),
        lambda d: json.dumps(d | {"attempts": [{}]}),
        lambda d: "[" * 100_000,
    ],
)
def test_a_damaged_item_is_named_and_not_taken(tmp_path: Path, damage: Any) -> None:
    item = write_item(tmp_path, make_item())
    path = item_path(tmp_path, item.sha256)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(DataError, match=rf"{item.sha256}.json: not a caption as it was written .*delete it and run"):
        read_item(tmp_path, item.sha256)


def test_of_clips_with_one_caption_the_first_has_it_unless_they_were_one_question() -> None:
    a, b = make_item("a" * 16), make_item("b" * 16, GOOD.upper(), "another ball")
    c = make_item("c" * 16, "", "third")
    assert [r.caption for r in merge([a, b, c])] == [GOOD, "", ""]
    assert [r.reason for r in merge([a, b, c])] == ["", f"duplicate: the same answer as for {'a' * 16}", "refusal"]
    assert [r.caption for r in merge([b, a])] == [GOOD.upper(), ""]
    same = make_item("b" * 16)
    assert [r.caption for r in merge([a, same])] == [GOOD, GOOD]  # by the text alone
    seen = [dataclasses.replace(i, frames=4) for i in (a, same)]
    assert [r.caption for r in merge(seen)] == [GOOD, ""]


# ---------------------------------------------------------------------------------------------------------------------


def config(folder: Path, **caption: Any) -> Config:
    section = {"endpoint": {"url": "http://localhost:1/v1", "model": "m"}, **caption}
    return parse_config({"run": "r", "runs_dir": str(folder), "caption": section})


def video(key: str, ok: bool = True) -> Video:
    return Video(key, f"/v/{key}.mp4", "short", 9, 8.0, 64, 64, "h264", 1.0, 1, 1, "ok" if ok else "rejected", "")


KEYS = [f"{i:016x}" for i in range(400)]


def write_table(conf: Config, rows: list[Row]) -> None:
    conf.run_dir.mkdir(parents=True, exist_ok=True)
    write_captions(conf.run_dir / CAPTIONS, rows, caption_settings(conf))


def opened(folder: Path, videos: list[Video]) -> Rows:
    write_manifest(folder / MANIFEST, videos)
    return open_manifest(folder / MANIFEST)


def test_clips_with_a_detailed_caption_have_a_key_of_their_own_and_keep_the_first(tmp_path: Path) -> None:
    conf = config(tmp_path)
    videos = [*map(video, KEYS), video("", ok=False)]
    write_table(
        conf, [Row(k, "" if i == 0 else f"detailed {i}", "refusal" if i == 0 else "", "x") for i, k in enumerate(KEYS)]
    )
    rows, detailed = with_captions(conf, opened(tmp_path, videos))
    made = list(rows)
    assert made[-1] == videos[-1] and made[0] == videos[0]
    for old, new in zip(videos[1:-1], made[1:-1], strict=True):
        assert new.key != old.key and len(new.key) == 16
        assert dataclasses.replace(new, key=old.key) == old
    assert len({v.key for v in made}) == len(made)
    assert list(detailed) == ["", *(f"detailed {i}" for i in range(1, len(KEYS))), ""]
    again, same = with_captions(conf, opened(tmp_path, videos))
    assert list(again) == made and list(same) == list(detailed)


def test_without_the_section_or_for_prompts_alone_the_manifest_is_what_it_was(tmp_path: Path) -> None:
    videos = opened(tmp_path, [video(KEYS[0])])
    assert with_captions(config(tmp_path, clips=False), videos) == (videos, [""])
    assert with_captions(parse_config({"run": "r"}), videos) == (videos, [""])


@pytest.mark.parametrize(
    ("changes", "rows", "expected"),
    [
        ({}, None, "no such table of captions; run `sorahpc caption` first"),
        ({}, KEYS[:1], f"lacks 1 clips of the manifest, such as /v/{KEYS[1]}.mp4; run `sorahpc caption` again"),
        (
            {"min_chars": 50},
            KEYS[:2],
            "made with other settings than the section `caption`; run `sorahpc caption` again",
        ),
        ({"instruction": "say {caption}"}, KEYS[:2], "made with other settings"),
        ({"seed": 1}, KEYS[:2], "made with other settings"),
        ({"frames": 3}, KEYS[:2], "made with other settings"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], rows: list[str] | None, expected: str
) -> None:
    if rows is not None:
        write_table(config(tmp_path), [Row(k, "c", "", "x") for k in rows])
    with pytest.raises(DataError, match=expected):
        with_captions(config(tmp_path, **changes), opened(tmp_path, [video(k) for k in KEYS[:2]]))


def test_another_address_of_the_same_model_makes_no_other_captions(tmp_path: Path) -> None:
    a = config(tmp_path, endpoint={"url": "http://n1:8000/v1", "model": "m", "timeout_s": 5}, clips=False)
    b = config(tmp_path, endpoint={"url": "https://n2/v1", "model": "m"}, resources={"tasks": 9})
    assert caption_settings(a) == caption_settings(b)
    assert caption_settings(a) != caption_settings(config(tmp_path, endpoint={"url": "http://n1/v1", "model": "M"}))


def test_a_damaged_table_is_one_line(tmp_path: Path) -> None:
    conf = config(tmp_path)
    path = conf.run_dir / CAPTIONS
    write_table(conf, [Row(k, "c", "", "x") for k in KEYS[:3]])
    assert read_captions(path)[0] == [Row(k, "c", "", "x") for k in KEYS[:3]]
    whole = path.read_bytes()
    for data in (b"", whole[:-20], whole[: len(whole) // 2], b"PAR1" + os.urandom(100)):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"not a whole Parquet file: .*; run `sorahpc caption` again") as caught:
            read_captions(path)
        assert "\n" not in str(caught.value)
    (tmp_path / "m.parquet").write_bytes(whole)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"key": ["a"]}), path)
    with pytest.raises(DataError, match="captions of version 1 expected, found none"):
        read_captions(path)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, "caption.path: expected one of caption.path and caption.endpoint, not both or none"),
        ({"path": "a", "endpoint": {"url": "http://h/v1", "model": "m"}}, "caption.path: expected one of"),
        ({"path": "a", "instruction": "no place"}, "caption.instruction: expected a text that holds {caption} once"),
        (
            {"path": "a", "prompt_instruction": "{caption} {caption}"},
            "caption.prompt_instruction: expected a text that",
        ),
        ({"path": "a", "min_chars": 9, "max_chars": 8}, "caption.min_chars: expected at most max_chars = 8"),
        ({"path": "a", "share": 0.5}, "caption.share: unknown key"),
        ({"endpoint": {"url": "http://u:" + "p@h/v1", "model": "m"}}, "caption.endpoint.url: expected http(s)://host"),
        ({"endpoint": {"url": "http://h/v1?key=1", "model": "m"}}, "caption.endpoint.url: expected http(s)://host"),
        ({"endpoint": {"url": "file:///etc/passwd", "model": "m"}}, "caption.endpoint.url: expected http(s)://host"),
        ({"endpoint": {"url": "http://h/v1\r\nX: y", "model": "m"}}, "caption.endpoint.url: expected http(s)://host"),
        (
            {"endpoint": {"url": "http://h/v1", "model": "m", "key_env": "a b"}},
            "caption.endpoint.key_env: expected the",
        ),
        ({"endpoint": {"url": "http://h/v1", "model": "m", "key": "x"}}, "caption.endpoint.key: unknown key"),
    ],
)
def test_a_wrong_section_is_one_line(section: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"run": "r", "caption": section})
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_expanding_prompts_needs_a_model() -> None:
    with pytest.raises(ConfigError, match=r"sample\.expand: expected false, or a section `caption`"):
        parse_config({"run": "r", "sample": {"prompts": "p", "expand": True}})


def test_the_built_in_instructions_hold_the_caption_once_and_speak_of_frames_only_where_there_are_some() -> None:
    for frames in (0, 4):
        text = instruction_of(parse_config({"run": "r", "caption": {"path": "a", "frames": frames}}).caption)
        assert text.count("{caption}") == 1 and text.count("{") == 1
        assert ("some of its frames" in text) == (frames > 0)
