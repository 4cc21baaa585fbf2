"""What is taken out of texts that others wrote, and what is left alone."""

import time

import pytest

from storage.redaction import looks_secret, printable, redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("key AKIAABCDEFGHIJKLMNOP, and", "key [redacted], and"),
        ("ASIAABCDEFGHIJKLMNOP", "[redacted]"),
        ("token hf_abcdefghijklmnopqrstuvwx!", "token [redacted]!"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: [redacted]"),
        ("https://me:s3cret@host/x", "https://[redacted]@host/x"),
        ("https://sometoken@host/x", "https://[redacted]@host/x"),
        ("https://h/k?X-Amz-Signature=0f0f&b=1", "https://h/k?[redacted]&b=1"),
        ("post to https://hooks.slack.com/services/T0/B0/xyz failed", "post to https://[redacted] failed"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG+bPx", "aws_secret_access_key = [redacted]"),
        ('{"api_key": "0123456789abcdef"}', '{"api_key": "[redacted]"}'),
        (r'"message": "password=\"hunter2hunter2\""', r'"message": "password=\"[redacted]\""'),
        ("SLACK_TOKEN=xoxb-12345678", "SLACK_TOKEN=[redacted]"),
    ],
)
def test_what_looks_like_a_credential_is_replaced(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown, "redacting twice changes nothing more"


@pytest.mark.parametrize(
    "value",
    [
        "AKIAABCDEFGHIJKLMNOP",
        "hf_abcdefghijklmnopqrstuvwx",
        "https://me:s3cret@host/x",
        "https://h/k?X-Amz-Signature=0f0f&b=1",
        "https://hooks.slack.com/services/T0/B0/xyz",
    ],
)
def test_a_value_with_the_shape_of_a_credential_looks_secret(value: str) -> None:
    assert looks_secret(f"url: {value}")


@pytest.mark.parametrize(
    "text",
    [
        "ValueError: no images in /data/cats (give a folder)",
        '{"event": "step", "step": 12, "loss": 0.125, "lr": 0.0001, "step_s": 0.5}',
        "tokenizer: CLIPTokenizer, max_tokens=77, pad_token: <|endoftext|>",
        "s3://bucket/prefix?endpoint=https://s3.example.org: the store answered 503 SlowDown",
        "sha256 is 042fa108f6b4, its record says eb1fb8462946",
    ],
)
def test_what_is_no_credential_is_left_alone(text: str) -> None:
    assert redacted(text) == text
    assert printable(text) == text
    assert not looks_secret(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;your title\x07on", "on"),
        ("\x1b]8;;https://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]52;c;never closed", "52;c;never closed"),
        ("\x9b2Jgone", "gone"),
        ("a\rb\x08c\x00d\x7f", "abcd"),
        ("a\tb\nc", "a\tb\nc"),
        ("safe\u202egnp.exe", "safegnp.exe"),
        ("ä ☃ 👩‍🚀", "ä ☃ 👩‍🚀"),
    ],
)
def test_what_a_terminal_would_obey_is_taken_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("unit", ["a-", "://a:", "secret", "sk-", "\x1b]", "Bearer ", "x"])
def test_no_text_is_slow_to_redact(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    began = time.process_time()
    printable(redacted(text))
    assert time.process_time() - began < 20, "the time grows faster than the text"
