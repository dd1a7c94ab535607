"""Text to tokens and back, with the special tokens and the chat template of an instruction-tuned model."""

import datetime
import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

# Pre-tokenizers that split digits one by one; the rest is split as in GPT-2.
_DIGITS = ("smollm",)
# Special tokens in the styles of Llama, Qwen and Phi, and of Gemma.
_SPECIAL = re.compile(r"<\|\w+\|>|<(?:start|end)_of_\w+>")
_GENERATION = re.compile(r"(\{%[-+]?\s*(?:end)?)generation(\s*[-+]?%\})")


class Tokenizer(NamedTuple):
    """A tokenizer.

    Attributes:
      tokenizer: The tokenizer of the package tokenizers, for anything not offered here.
      end: The token that ends an answer.
      template: Jinja template of conversations, or None.
      vocabulary: Number of tokens.
      special: Texts of special tokens by the names that templates use for them, such as `bos_token`.
      stops: Other tokens at which the model stops, such as those that end a text rather than an answer.
    """

    tokenizer: Any
    end: int
    template: str | None
    vocabulary: int
    special: Mapping[str, str] = MappingProxyType({})
    stops: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; special tokens written out in it are recognised."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True, **names: Any) -> str:
        """The text of a conversation, up to where the model's answer begins.

        Args:
          messages: Dicts with `role`, one of system, user and assistant, and `content`.
          answer: Whether the model's answer is to follow.
          **names: Other names that the template reads: `date_string="26 Jul 2024"` for Llama 3.2, which otherwise
            writes today's date.

        Raises:
          ValueError: If the model has no chat template, the messages are not such dicts, or the template refuses them.
        """
        if self.template is None:
            raise ValueError("template: got none, expected a model with a chat template")
        _check_messages(messages)
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # The same set-up as in transformers, for which templates are written.
        options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
        environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"], **options)
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        functions = {"raise_exception": _refuse, "strftime_now": _now}
        known = {"messages": messages, "add_generation_prompt": answer, "tools": None, "documents": None}
        known |= functions | dict(self.special) | names
        # The tag only tells transformers what to train on. It becomes another one without effect, as Jinja removes the
        # blanks and line breaks around tags.
        text = _GENERATION.sub(r"\1with\2", self.template)
        try:
            return environment.from_string(text).render(known)
        except jinja2.TemplateError as error:
            raise ValueError(f"messages: got some that the chat template cannot render: {error}") from error


def _check_messages(messages):
    """Refuses what Jinja would render as empty messages: it has no error for entries that are missing."""
    wanted = 'a list of dicts such as {"role": "user", "content": "..."}'
    if isinstance(messages, str | Mapping):
        raise ValueError(f"messages: got {str(messages)[:60]!r}, expected {wanted}")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"messages[{position}]: got {str(message)[:60]!r}, expected {wanted}")


def _now(form):
    return datetime.datetime.now().strftime(form)


def _refuse(message):
    raise ValueError(f"messages: got some that the chat template refuses: {message}")


def check_template(where: str, template: str | None, known: Collection[str]) -> None:
    """Raises `ValueError` for a chat template that writes some special tokens that are known and some that are not.

    If none is known they are meant as plain text, as in the templates of TinyLlama and Tulu 3.

    >>> check_template("folder", "<|im_start|>{{ text }}<|im_end|>", ["<|im_end|>"])
    Traceback (most recent call last):
    ValueError: folder: got no special token <|im_start|>, expected those that the chat template writes
    """
    written = set(_SPECIAL.findall(template or ""))
    missing = sorted(written.difference(known))
    if missing and len(missing) < len(written):
        raise ValueError(f"{where}: got no special token {missing[0]}, expected those that the chat template writes")


def bytes_tokenizer(
    where: str,
    kind: tuple[str | None, str | None],
    tokens: Sequence[str],
    merges: Sequence[str],
    special: Sequence[int],
    end: int | None,
    template: str | None,
    named: Mapping[str, int] = MappingProxyType({}),
) -> Tokenizer:
    """A byte-level BPE tokenizer from tokens and merges.

    Args:
      where: Name of the file in errors.
      kind: Kinds of the tokenizer and of its pre-tokenizer, as GGUF names them.
      tokens, merges: As in the files of GPT-2.
      special: Ids of special tokens, which BPE never produces from text.
      end: Id of the token that ends an answer.
      template: Jinja template of conversations.
      named: Ids of special tokens by the names that templates use for them.

    Raises:
      ImportError: Without the package tokenizers.
      ValueError: For another kind, missing tokens, merges or end token, or a template that `check_template` refuses.

    >>> bytes_tokenizer("a.gguf", ("llama", "default"), [], [], [], None, None)
    Traceback (most recent call last):
    ValueError: a.gguf: got a tokenizer of kind llama, default, expected gpt2, smollm
    """
    if kind[0] != "gpt2" or kind[1] not in _DIGITS:
        raise ValueError(
            f"{where}: got a tokenizer of kind {kind[0]}, {kind[1]}, expected gpt2, {' or '.join(_DIGITS)}"
        )
    if not tokens or not merges:
        raise ValueError(f"{where}: got {len(tokens)} tokens and {len(merges)} merges, expected at least one of each")
    names = [tokens[i] for i in special]
    if end is None or end not in special:
        raise ValueError(f"{where}: got {end} as the token that ends an answer, expected the id of a special token")
    check_template(where, template, names)
    try:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Fast
    except ImportError as error:
        raise ImportError("tokenizers are needed: pip install 'eupmu-jax[language]'") from error
    vocabulary = {token: i for i, token in enumerate(tokens)}
    fast = Fast(models.BPE(vocabulary, [tuple(merge.split(" ", 1)) for merge in merges]))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return Tokenizer(fast, end, template, len(tokens), {name: tokens[i] for name, i in named.items()})
