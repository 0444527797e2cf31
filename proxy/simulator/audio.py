"""OpenAI's audio: text to sound, sound to text.

Speech is sound of the length its words would take; what sounds depends on the words alone. A transcription tells what
was heard: how many bytes, and their digest.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from base64 import b64encode
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from proxy.simulator.answers import StreamedForm, WholeForm, event, text
from proxy.simulator.asks import Ask, BadAsk, decode
from proxy.simulator.forms import Form
from proxy.simulator.provider import Size

_TYPES = {"mp3": "audio/mpeg", "wav": "audio/wav", "pcm": "audio/pcm"}
_HERTZ = 24_000  # of pcm and wav: 16 bits, one channel, as the real one has it
_WORD_SAMPLES = _HERTZ // 4
_MP3_HEAD = b"\xff\xfb\x94\xc0" + bytes(17)  # MPEG-1, layer III, 48 kHz, 128 kbit/s, one channel; nothing but silence
_MP3_FRAME = 384  # bytes; 24 ms
_WORD_FRAMES = 10
_BYTES_PER_SECOND = 16_000  # of sound that is heard, whatever it is packed in
_BYTES_PER_TOKEN = 1024
_HEARD = ("json", "text", "srt", "vtt", "verbose_json")
_encode = msgspec.json.encode


class _Speech(msgspec.Struct):
    model: str
    input: str
    voice: str | dict[str, str]
    response_format: str = "mp3"
    stream_format: str = "audio"


@dataclass(frozen=True, slots=True)
class Spoken(Ask):
    format: str = "mp3"
    in_events: bool = False


def speech(body: bytes) -> Spoken:
    """Raises BadAsk."""
    said = decode(body, _Speech)
    if said.response_format not in _TYPES:
        raise BadAsk(f"The simulated provider speaks {', '.join(_TYPES)}; not '{said.response_format}'.")
    return Spoken(
        said.model,
        (said.input,),
        Size(len(said.input)),
        stream=True,
        format=said.response_format,
        in_events=said.stream_format == "sse",
    )


class Speech(StreamedForm):
    """Never given whole, but streamed, as bytes or as events."""

    ask: Spoken

    @property
    def stream_type(self) -> str:
        return super().stream_type if self.ask.in_events else _TYPES[self.ask.format]

    def opening(self) -> bytes:
        return self._told(_wav_head()) if self.ask.format == "wav" else b""

    def piece(self, index: int, words: str) -> bytes:
        sound = _frames if self.ask.format == "mp3" else _tone
        return self._told(b"".join(sound(word) for word in words.split()))

    def closing(self) -> bytes:
        return event("speech.audio.done", usage=self.usage()) if self.ask.in_events else b""

    def failure(self) -> bytes:
        return super().failure() if self.ask.in_events else b""

    def usage(self) -> dict[str, object]:
        return _usage(self.admitted.input_tokens, self.output_tokens)

    def _told(self, sound: bytes) -> bytes:
        return event("speech.audio.delta", audio=b64encode(sound).decode()) if self.ask.in_events else sound


def _usage(entered: int, left: int) -> dict[str, object]:
    return {"input_tokens": entered, "output_tokens": left, "total_tokens": entered + left}


@lru_cache(512)
def _tone(word: str) -> bytes:
    """A quarter of a second of a low rectangular wave, higher or lower by the word."""
    half = _HERTZ // (150 + hashlib.sha256(word.encode()).digest()[0]) // 2
    wave = array("h", [1000] * half + [-1000] * half) * (_WORD_SAMPLES // (2 * half) + 1)
    return wave[:_WORD_SAMPLES].tobytes()


@lru_cache(512)
def _frames(word: str) -> bytes:
    """As much silence: what stands in a frame behind its head is not played, and depends on the word."""
    rest = hashlib.shake_128(word.encode()).digest(_MP3_FRAME - len(_MP3_HEAD)).replace(b"\xff", b"\xfe")
    return (_MP3_HEAD + rest) * _WORD_FRAMES


def _wav_head() -> bytes:
    """Of a length that is not known yet."""
    fmt = struct.pack("<HHIIHH", 1, 1, _HERTZ, 2 * _HERTZ, 2, 16)
    endless = b"\xff\xff\xff\xff"
    return b"RIFF" + endless + b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + endless


@dataclass(frozen=True, slots=True)
class Heard(Ask):
    format: str = "json"
    seconds: float = 0.0
    task: str = "transcribe"


def transcription(form: Form) -> Heard:
    """Raises BadAsk."""
    return _heard(form, "transcribe")


def translation(form: Form) -> Heard:
    """Raises BadAsk."""
    return _heard(form, "translate")


def _heard(form: Form, task: str) -> Heard:
    sound = form.file("file")
    wanted = form.fields.get("response_format", "json")
    if wanted not in _HEARD:
        raise BadAsk(f"Invalid 'response_format': '{wanted}'. Supported values are: {', '.join(_HEARD)}.")
    size = len(sound.content)
    return Heard(
        form.must("model"),
        (f"{size} bytes of {sound.name}, {hashlib.sha256(sound.content).hexdigest()}",),
        Size(4 * size // _BYTES_PER_TOKEN),
        stream=form.fields.get("stream") == "true",
        format=wanted,
        seconds=size / _BYTES_PER_SECOND,
        task=task,
    )


class Transcript(WholeForm, StreamedForm):
    ask: Heard

    @property
    def media_type(self) -> str:
        return "application/json" if self.ask.format.endswith("json") else "text/plain"

    def body(self) -> bytes:
        words = text(self.ask.prompts[0], self.admitted.output_tokens)
        end = _stamp(self.ask.seconds)
        match self.ask.format:
            case "text":
                return f"{words}\n".encode()
            case "srt":
                return f"1\n00:00:00,000 --> {end.replace('.', ',')}\n{words}\n\n".encode()
            case "vtt":
                return f"WEBVTT\n\n00:00:00.000 --> {end}\n{words}\n\n".encode()
            case "verbose_json":
                usage = {"type": "duration", "seconds": self.ask.seconds}
                told = {"task": self.ask.task, "language": "english", "duration": self.ask.seconds, "segments": []}
                return _encode({**told, "text": words, "usage": usage})
        return _encode({"text": words, "usage": self.usage()})

    def opening(self) -> bytes:
        return b""

    def piece(self, index: int, words: str) -> bytes:
        return event("transcript.text.delta", delta=words)

    def closing(self) -> bytes:
        words = text(self.ask.prompts[0], self.admitted.output_tokens)
        return event("transcript.text.done", text=words, usage=self.usage())

    def usage(self) -> dict[str, object]:
        entered = self.admitted.input_tokens
        details = {"text_tokens": 0, "audio_tokens": entered}
        return {"type": "tokens", **_usage(entered, self.output_tokens), "input_token_details": details}


def _stamp(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes // 60):02}:{int(minutes % 60):02}:{rest:06.3f}"
