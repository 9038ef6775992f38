"""The prompts file, well meant and hostile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sorahpc.data.prompts import Prompt, read_prompts, slug
from sorahpc.errors import ConfigError


def write(tmp_path: Path, content: str | bytes, name: str = "prompts.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_prompt_a_line_with_blank_lines_comments_bom_and_crlf(tmp_path: Path) -> None:
    content = "\ufeff# what to make\r\n\r\na red ball \r\n  # indented comment\r\nun café à 8h\r\n"
    path = write(tmp_path, content.encode())
    assert read_prompts(path) == [Prompt(0, 3, "a red ball"), Prompt(1, 5, "un café à 8h")]


def test_a_text_line_that_looks_like_json_is_a_prompt(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, '{"prompt": "x"}\n'))[0].text == '{"prompt": "x"}'


def test_jsonl_lines_carry_their_own_settings(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "seed": 7, "height": 64, "width": 96, "frames": 9, "fps": 12},
        {"prompt": "b", "seed": None},
        {"prompt": "# not a comment here"},
    ]
    prompts = read_prompts(write(tmp_path, "\n".join(map(json.dumps, lines)), "p.jsonl"))
    assert prompts[0] == Prompt(0, 1, "a", seed=7, height=64, width=96, frames=9, fps=12.0)
    assert prompts[1] == Prompt(1, 2, "b")
    assert prompts[2].text.startswith("#")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 1: not valid JSON"),
        ("[" * 100_000, "line 1: not valid JSON"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "line 1: not valid JSON"),
        ("3", "expected a JSON object with `prompt`, found 3"),
        ('{"seed": 1}', "prompt: missing"),
        ('{"prompt": 5}', "prompt: expected text, found 5"),
        ('{"prompt": "  "}', "prompt: expected text, found nothing"),
        ('{"prompt": "a", "sed": 1}', "did you mean `seed`?"),
        ('{"prompt": "a", "seed": -1}', "seed: expected a whole number"),
        ('{"prompt": "a", "seed": true}', "seed: expected a whole number"),
        ('{"prompt": "a", "height": 1e3}', "height: expected a whole number"),
        ('{"prompt": "a", "width": 1000000000}', "width: expected a whole number"),
        ('{"prompt": "a", "frames": 0}', "frames: expected a whole number"),
        ('{"prompt": "a", "fps": 0}', "fps: expected a number above 0"),
        ('{"prompt": "a", "fps": NaN}', "fps: expected a number above 0"),
        ('{"prompt": "\\ud800"}', "U+D800"),
        ('{"prompt": "a\\u0000b"}', "character 2 is U+0000"),
    ],
)
def test_a_bad_json_line_is_one_line_that_names_file_line_and_fault(tmp_path: Path, line: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_prompts(write(tmp_path, line, "p.jsonl"))
    message = str(caught.value)
    assert expected in message and "p.jsonl line 1" in message
    assert len(message.splitlines()) == 1 and len(message) < 400


def test_control_characters_are_named_and_never_echoed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_prompts(write(tmp_path, "fine\nred \x1b[31mball\n"))
    assert "line 2: prompt: character 5 is U+001B" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_every_faulty_line_is_listed_up_to_twenty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_prompts(write(tmp_path, "\x07\n" * 50))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[-1].endswith("and 30 more faults")


@pytest.mark.parametrize("content", [b"", b"\n\n# only comments\n", b"\xff\xfe\x00"])
def test_a_file_without_prompts_or_not_text_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match=r"sample\.prompts"):
        read_prompts(write(tmp_path, content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ConfigError, match=r"sample\.prompts"):
            read_prompts(path)


def test_a_long_prompt_is_taken_and_a_far_too_long_one_refused(tmp_path: Path) -> None:
    assert len(read_prompts(write(tmp_path, "ball " * 2000))[0].text) == 9999
    with pytest.raises(ConfigError, match="25000 characters; at most 20000"):
        read_prompts(write(tmp_path, "x" * 25_000))


def test_the_name_holds_no_path_whatever_the_prompt() -> None:
    assert Prompt(7, 1, "../../etc/passwd").name == "00007-etc-passwd"
    assert Prompt(0, 1, "/").name == "00000-prompt"
    assert Prompt(1, 1, "红色的球").name == "00001-prompt"
    assert Prompt(2, 1, "Ünïcode Ball, big!").name == "00002-unicode-ball-big"
    assert slug("a" * 39 + " b") == "a" * 39
    assert len(slug("word " * 2000)) <= 40


@given(st.text(max_size=200))
def test_slug_is_always_safe(text: str) -> None:
    s = slug(text)
    assert 1 <= len(s) <= 40 and set(s) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert not s.startswith("-") and not s.endswith("-")


@given(st.binary(max_size=300))
def test_any_bytes_are_prompts_or_one_clear_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("p") / "p.jsonl"
    path.write_bytes(content)
    try:
        assert read_prompts(path)
    except ConfigError as error:
        assert "p.jsonl" in str(error)
