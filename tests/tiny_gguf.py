"""Tiny language models for a real llama-server, written in plain Python.

A `TinyModel` is a llama of two layers and random weights, 0.6 MB as GGUF, made in a fraction of
a second and always the same bytes for the same options. What it says means nothing, but it can
be read: one channel of its hidden state is a constant, which turns the first column of the
output matrix into a bias for each token, and the bias lets only words, punctuation, the end of
the turn and, on request, the opening of a tool call come up.

Nothing here knows llama-server; the format is documented at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

END_OF_TURN = "<|im_end|>"

_WORDS = """I you we they it this that here there one some every small tall warm cold green grey
early late boat bridge garden harbour island lamp letter market mountain ocean road ship street
table train valley village window carry close draw drift find follow keep learn leave look make
meet open read sail see send sleep speak wait walk write and but or when while under over through
d\u00e9j\u00e0 \u03bb\u03cc\u03b3\u03bf\u03c2 \u6c34 \U0001f642""".split()
_CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", END_OF_TURN)
_PUNCTUATION = ".,!?"
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")

# ChatML; tools are listed, called and answered in the form that most open models were trained on
_TEMPLATE = r"""
{%- if tools -%}
{{ '<|im_start|>system\nTools:\n' }}
{%- for tool in tools -%}{{ tool | tojson }}{{ '\n' }}{%- endfor -%}
{{ 'A call: <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call><|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{ '<|im_start|>user\n<tool_response>' + message.content + '</tool_response><|im_end|>\n' }}
{%- else -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if @REASONING@ and message.reasoning_content -%}
{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
{%- endif -%}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
{{ '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson -}}
{{ '}</tool_call>\n' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}{%- if @REASONING@ -%}{{ '<think>\n' }}{%- endif -%}
{%- endif -%}
"""

_LAYERS, _WIDTH, _HEADS, _FEED_FORWARD = 2, 64, 4, 128
_CONSTANT = 4.0  # the constant channel of every token's embedding ...
_CONSTANT_SEEN = 3.0  # ... and about what the last norm leaves of it
_NEVER = -30.0  # a bias that no random logit makes up for


@dataclass(frozen=True, slots=True)
class TinyModel:
    """What kind of model to make.

    context: tokens it was "trained" for. endless: it never ends an answer by itself. tools: it
    would rather call than speak; asked with `tool_choice: "required"` it calls once at
    temperature 0, and once or more at 1. reasoning: it opens every answer with <think>.
    embedding: it declares mean pooling.
    """

    context: int = 2048
    endless: bool = False
    tools: bool = False
    reasoning: bool = False
    embedding: bool = False
    seed: int = 0

    def write(self, folder: Path) -> Path:
        """The model's file in `folder`, made if it isn't there yet. The name tells the content."""
        made_from = f"{self!r}{Path(__file__).read_text(encoding='utf-8')}"
        path = folder / f"tiny-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.gguf"
        if not path.exists():
            _write_whole(path, self.to_bytes())
        return path

    def to_bytes(self) -> bytes:
        """The model as GGUF."""
        vocabulary = _vocabulary(self)
        return _gguf(_metadata(self, vocabulary), list(_tensors(self, vocabulary)))


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file that other processes see complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(name).replace(path)


# ---- the vocabulary ----


@dataclass(frozen=True, slots=True)
class _Token:
    """One token: SentencePiece's text, kind and score, and the bias of its logit."""

    text: str
    kind: int
    score: float = 0.0
    bias: float = _NEVER


_NORMAL, _UNKNOWN, _CONTROL_KIND, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # GGUF's token types


def _vocabulary(model: TinyModel) -> list[_Token]:
    bias = _biases(model)
    tokens = [_Token(text, _CONTROL_KIND if i else _UNKNOWN, bias=bias(text)) for i, text in enumerate(_CONTROL)]
    tokens += [_Token(f"<0x{byte:02X}>", _BYTE) for byte in range(256)]
    tokens += [_Token(text, _USER_DEFINED, bias=bias(text)) for text in _TAGS]
    tokens += [_Token(mark, _NORMAL, score=-1.0, bias=bias(mark)) for mark in _PUNCTUATION]
    words = [f"\u2581{word}" for word in _WORDS]
    tokens += [_Token(word, _NORMAL, score=-float(len(word)), bias=0.0) for word in words]
    known = {token.text for token in tokens}
    return tokens + [token for token in _steps_to(words) if token.text not in known]


def _biases(model: TinyModel) -> Callable[[str], float]:
    """The bias of what is neither a word nor a step to one."""
    chosen = {END_OF_TURN: 2.5, **dict.fromkeys(_PUNCTUATION, -2.0)}  # answers of some ten words
    if model.tools:
        # a comma between calls would beg for one more without end
        chosen = {END_OF_TURN: 8.5, "<tool_call>": 8.0, **dict.fromkeys(_PUNCTUATION, 2 * _NEVER)}
    if model.endless:
        chosen[END_OF_TURN] = _NEVER
    return lambda text: chosen.get(text, _NEVER)


def _steps_to(words: Sequence[str]) -> list[_Token]:
    """Single characters, and the prefixes through which they merge into words."""
    steps = {chr(code): _Token(chr(code), _NORMAL, score=-100.0) for code in range(0x21, 0x7F)}
    for word in words:
        for end in range(1, len(word)):
            steps.setdefault(word[:end], _Token(word[:end], _NORMAL, score=-50.0 - end))
    return list(steps.values())


# ---- metadata and weights ----


def _metadata(model: TinyModel, vocabulary: Sequence[_Token]) -> bytes:
    template = _TEMPLATE.replace("@REASONING@", "true" if model.reasoning else "false")
    entries = [
        _entry("general.architecture", _STRING, _string("llama")),
        _entry("general.name", _STRING, _string("tiny")),
        _entry("llama.context_length", _U32, struct.pack("<I", model.context)),
        _entry("llama.embedding_length", _U32, struct.pack("<I", _WIDTH)),
        _entry("llama.block_count", _U32, struct.pack("<I", _LAYERS)),
        _entry("llama.feed_forward_length", _U32, struct.pack("<I", _FEED_FORWARD)),
        _entry("llama.attention.head_count", _U32, struct.pack("<I", _HEADS)),
        _entry("llama.attention.head_count_kv", _U32, struct.pack("<I", _HEADS)),
        _entry("llama.attention.layer_norm_rms_epsilon", _F32, struct.pack("<f", 1e-5)),
        _entry("llama.rope.dimension_count", _U32, struct.pack("<I", _WIDTH // _HEADS)),
        _entry("llama.vocab_size", _U32, struct.pack("<I", len(vocabulary))),
        _entry("tokenizer.ggml.model", _STRING, _string("llama")),
        _entry("tokenizer.ggml.pre", _STRING, _string("default")),
        _entry("tokenizer.ggml.tokens", _ARRAY, _array(_STRING, [_string(t.text) for t in vocabulary])),
        _entry("tokenizer.ggml.scores", _ARRAY, _array(_F32, [struct.pack("<f", t.score) for t in vocabulary])),
        _entry("tokenizer.ggml.token_type", _ARRAY, _array(_I32, [struct.pack("<i", t.kind) for t in vocabulary])),
        _entry("tokenizer.ggml.unknown_token_id", _U32, struct.pack("<I", _CONTROL.index("<unk>"))),
        _entry("tokenizer.ggml.bos_token_id", _U32, struct.pack("<I", _CONTROL.index("<s>"))),
        _entry("tokenizer.ggml.eos_token_id", _U32, struct.pack("<I", _CONTROL.index(END_OF_TURN))),
        _entry("tokenizer.ggml.add_bos_token", _BOOL, b"\x01"),
        _entry("tokenizer.ggml.add_space_prefix", _BOOL, b"\x00"),
        _entry("tokenizer.chat_template", _STRING, _string(template)),
    ]
    if model.embedding:
        entries.append(_entry("llama.pooling_type", _U32, struct.pack("<I", 1)))  # 1 = the mean
    return struct.pack("<Q", len(entries)) + b"".join(entries)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One weight; `shape` starts with the dimension that varies fastest."""

    name: str
    shape: tuple[int, ...]
    values: array[float]


def _tensors(model: TinyModel, vocabulary: Sequence[_Token]) -> Iterator[_Tensor]:
    dice = random.Random(model.seed)
    yield _embeddings(dice, len(vocabulary))
    yield _ones("output_norm.weight")
    yield _output(dice, vocabulary)
    for layer in range(_LAYERS):
        yield from _block(dice, f"blk.{layer}")


def _embeddings(dice: random.Random, count: int) -> _Tensor:
    table = _matrix(dice, "token_embd.weight", count, _WIDTH, 1.0)
    for row in range(count):
        table.values[row * _WIDTH] = _CONSTANT
    return table


def _output(dice: random.Random, vocabulary: Sequence[_Token]) -> _Tensor:
    table = _matrix(dice, "output.weight", len(vocabulary), _WIDTH, 0.25)
    for row, token in enumerate(vocabulary):
        start = row * _WIDTH
        table.values[start] = token.bias / _CONSTANT_SEEN
        if token.text in _CONTROL or token.text in _TAGS:  # the bias alone decides, wherever the text stands
            table.values[start + 1 : start + _WIDTH] = array("f", bytes(4 * (_WIDTH - 1)))
    return table


def _block(dice: random.Random, prefix: str) -> Iterator[_Tensor]:
    yield _ones(f"{prefix}.attn_norm.weight")
    yield _ones(f"{prefix}.ffn_norm.weight")
    for name, rows, columns in (
        ("attn_q", _WIDTH, _WIDTH),
        ("attn_k", _WIDTH, _WIDTH),
        ("attn_v", _WIDTH, _WIDTH),
        ("attn_output", _WIDTH, _WIDTH),
        ("ffn_gate", _FEED_FORWARD, _WIDTH),
        ("ffn_up", _FEED_FORWARD, _WIDTH),
        ("ffn_down", _WIDTH, _FEED_FORWARD),
    ):
        matrix = _matrix(dice, f"{prefix}.{name}.weight", rows, columns, columns**-0.5)
        if name in ("attn_output", "ffn_down"):  # what a layer adds leaves the constant channel alone
            matrix.values[:columns] = array("f", bytes(4 * columns))
        yield matrix


def _ones(name: str) -> _Tensor:
    return _Tensor(name, (_WIDTH,), array("f", [1.0]) * _WIDTH)


def _matrix(dice: random.Random, name: str, rows: int, columns: int, deviation: float) -> _Tensor:
    return _Tensor(name, (columns, rows), array("f", (dice.gauss(0.0, deviation) for _ in range(rows * columns))))


# ---- the file format: GGUF 3, little-endian ----

_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9  # GGUF's value types
_TENSOR_F32 = 0
_ALIGNMENT = 32


def _gguf(metadata: bytes, tensors: Sequence[_Tensor]) -> bytes:
    """`metadata` is the count of its entries, then the entries."""
    blobs = [_padded(_little_endian(tensor.values)) for tensor in tensors]
    head = b"GGUF" + struct.pack("<IQ", 3, len(tensors)) + metadata
    offset = 0
    for tensor, blob in zip(tensors, blobs, strict=True):
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        head += _string(tensor.name) + dimensions + struct.pack("<IQ", _TENSOR_F32, offset)
        offset += len(blob)
    return _padded(head) + b"".join(blobs)


def _entry(key: str, kind: int, value: bytes) -> bytes:
    return _string(key) + struct.pack("<I", kind) + value


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _array(kind: int, items: Sequence[bytes]) -> bytes:
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


def _little_endian(values: array[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)
