"""Text that the teacher writes itself: what a model knows is broader than any text at hand."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.convert.healing.text import TokenText
from foveate.tasks.chat import chat_turn, encode, leading_ids, without_special

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_EXCERPT = (48, 192)  # tokens of a document in a prompt
_PROMPTS = 8  # a row asks for as many texts before it begins with its first prompt again

_ABOUT_TEXT = (
    "What is the text above about?",
    "Summarise the text above in two sentences.",
    "Explain the text above to somebody who is new to the subject.",
    "Continue the text above.",
    "List the main points of the text above.",
    "Ask three questions that the text above answers, and answer them.",
    "Rewrite the text above in plain words.",
    "Give an example of what the text above describes.",
)
_FORMS = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "Tell me the history of {}.",
    "What are the most important facts about {}?",
    "Write a poem about {}.",
    "What do people often get wrong about {}?",
    "Write a dialogue between two people who talk about {}.",
    "Give me step by step advice about {}.",
    "Compare {} with something similar.",
    "Write a letter to a friend about {}.",
    "List ten words that have to do with {}, and say what they mean.",
    "Make up a quiz about {} and give the answers.",
)
_TOPICS = (
    "volcanoes|the Roman Empire|baking bread|prime numbers|the human heart|football|the French Revolution"
    "|photosynthesis|saving money|dolphins|black holes|learning a language|the Renaissance|bicycles|vaccines"
    "|jazz|democracy|chess|glaciers|electricity|moving to another city|Shakespeare|rice farming|earthquakes"
    "|friendship|the Silk Road|computers|bees|running a marathon|the periodic table|job interviews|rainforests"
    "|bridges|dreams|the water cycle|photography|dinosaurs|justice|fractions|trains|the Moon landing|spices"
    "|insurance|mythology|muscles|weather forecasts|architecture|whales|negotiation|the alphabet|gravity|tea"
    "|public speaking|rivers|coffee|sorting a list in Python|probability|robots|sleep|maps|the stock market"
    "|birds|poverty|perfume|opera|the immune system|gardening|ancient Egypt|honesty|lasers"
)


class Sampler:
    """Sequences that the teacher samples, at temperature 1 from its whole distribution.

    Half of the rows begin with nothing (the tokenizer's BOS), the others with prompts in the tokenizer's chat template:
    a short excerpt of the training text with a question, or a question of general knowledge. Where an answer ends, the
    row's next prompt follows. Nothing is read from the device until a block is done.

    Args:
        pool: rows that are sampled at once, a block.
        seed: equal seeds give equal sequences, on equal machines.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: TokenText,
        *,
        length: int,
        pool: int,
        seed: str,
    ) -> None:
        self.teacher, self.tokenizer, self.text = teacher, tokenizer, text
        self.length, self.pool, self.seed = length, pool, seed
        self._block: tuple[int, Tensor] | None = None

    def sequence(self, index: int) -> Tensor:
        """Token ids [length] of this number, on the teacher's device. Blocks are made when their first row is asked
        for."""
        block, row = divmod(index, self.pool)
        if self._block is None or self._block[0] != block:
            self._block = (block, self._sample(block))
        return self._block[1][row]

    @torch.inference_mode()
    def _sample(self, block: int) -> Tensor:
        rng = random.Random(f"sampling/{self.seed}/{block}")
        device = self.teacher.device
        prompts, lengths = self._prompts(rng)
        noise = torch.Generator(device).manual_seed(rng.getrandbits(62))
        prompts, lengths = prompts.to(device), lengths.to(device)
        rows, end = torch.arange(self.pool, device=device), self._end()
        turn, place, given = torch.zeros_like(rows), torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
        made = torch.empty(self.length, self.pool, dtype=torch.long, device=device)
        made[0], cache = prompts[:, 0, 0], None
        mode = self.teacher.training
        self.teacher.eval()
        for step in range(1, self.length):
            out = self.teacher(input_ids=made[step - 1, :, None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            # The greatest of p / e with exponential e is a draw from p.
            p = out.logits[:, -1].float().softmax(-1)
            drawn = (p / torch.empty_like(p).exponential_(generator=noise)).argmax(-1)
            place = place + 1
            over = ~given & (made[step - 1] == end)  # drawn, not one that stands in a prompt
            given = place < lengths[rows, turn]
            turn = torch.where(over, (turn + 1) % prompts.shape[1], turn)
            place = torch.where(over, 0, place)
            given = given | over
            forced = prompts[rows, turn, place.clamp(max=prompts.shape[2] - 1)]
            made[step] = torch.where(given, forced, drawn)
        self.teacher.train(mode)
        return made.T.contiguous()

    def _end(self) -> int:
        """The token that ends an answer; -1, which no token is, where there is none."""
        end: Any = self.tokenizer.eos_token_id
        return -1 if end is None else int(end)

    def _prompts(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Prompts [rows, turns, tokens], padded behind, and their lengths [rows, turns]."""
        rows = [
            [self._start(rng) if row % 2 == 0 else self._prompt(rng) for _ in range(_PROMPTS)]
            for row in range(self.pool)
        ]
        longest = min(self.length, max(len(prompt) for row in rows for prompt in row))
        padded = torch.zeros(self.pool, _PROMPTS, longest, dtype=torch.long)
        lengths = torch.zeros(self.pool, _PROMPTS, dtype=torch.long)
        for row, prompts in enumerate(rows):
            for turn, prompt in enumerate(prompts):
                kept = prompt[:longest]
                padded[row, turn, : len(kept)] = torch.tensor(kept)
                lengths[row, turn] = len(kept)
        return padded, lengths

    def _start(self, rng: random.Random) -> list[int]:
        """What stands before a text: BOS, or else the token that ends one; or the first token of a document."""
        head: list[int] = list(leading_ids(self.tokenizer))
        begin: Any = self.tokenizer.bos_token_id
        if not head and begin is not None:
            head = [int(begin)]
        return head or ([self._end()] if self._end() >= 0 else self._excerpt(rng)[:1])

    def _prompt(self, rng: random.Random) -> list[int]:
        frame = chat_turn(self.tokenizer)
        if rng.random() < 0.5:
            asked = rng.choice(_FORMS).format(rng.choice(_TOPICS.split("|")))
        else:
            excerpt = str(self.tokenizer.decode(self._excerpt(rng), skip_special_tokens=True))
            excerpt = without_special(self.tokenizer, excerpt).strip()
            asked = f"{excerpt}\n\n{rng.choice(_ABOUT_TEXT)}"
        return [*frame.ids, *encode(self.tokenizer, f"{frame.head}{asked}{frame.tail}").ids]

    def _excerpt(self, rng: random.Random) -> list[int]:
        document = rng.randrange(len(self.text.train_starts) - 1)
        start, stop = (int(self.text.train_starts[document + side]) for side in (0, 1))
        start += len(self.text.head)
        return self.text.train[start : min(stop, start + rng.randint(*_EXCERPT))].tolist()
