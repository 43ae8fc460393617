"""What artifacts are run on: real text as prefill and decode steps, and caches filled beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass

from pocketlm.certificate import Evidence
from pocketlm.errors import InputError
from pocketlm.manifest import Target
from pocketlm.tokenizer import Tokenizer
from pocketlm_export.backends.reading import Call, Past, Run
from pocketlm_export.graph.graph import Graph
from pocketlm_export.verify.sample_texts import TEXTS

__all__ = ["Runs", "choose_runs", "greedy_run"]

GREEDY_PROMPT = 16
PROBE_TOKENS = 3
LARGEST_PROBED_CACHE = 1 << 30  # bytes in float64, of all layers
ROWS = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """For models of up to ``weights``: a prompt of each length, one a text, each followed by ``steps`` decode steps."""

    weights: float
    prompts: tuple[int, ...]
    steps: int


# A reader's float64 products take about 0.05 s per token and billion weights on two cores.
PLANS = (
    Plan(weights=100e6, prompts=(3, 17, 96, 190), steps=64),
    Plan(weights=2e9, prompts=(48, 5), steps=64),
    Plan(weights=float("inf"), prompts=(16,), steps=8),
)


@dataclass(frozen=True, slots=True)
class Runs:
    """``texts`` go through every way of computing; ``probes`` begin with a filled cache; ``greedy_prompt`` is what an
    artifact continues by its own choice for ``steps`` tokens."""

    texts: tuple[Run, ...]
    probes: tuple[Run, ...]
    greedy_prompt: tuple[int, ...]
    steps: int

    def evidence(self) -> Evidence:
        """The numbers for the certificate."""
        calls = [call for run in self.texts for call in run.calls]
        return Evidence(
            texts=len(self.texts),
            prefill_tokens=sum(len(call.tokens) for call in calls if len(call.tokens) > 1),
            decode_steps=sum(len(call.tokens) == 1 for call in calls),
            judged_positions=sum(call.rows for call in calls),
            probes=[run.start for run in self.probes],
        )


def choose_runs(graph: Graph, target: Target, tokenizer: Tokenizer, weights: int) -> Runs:
    """The same tokens for every target of a bundle, in calls that ``target`` takes: prompts are cut where one is longer
    than its ``longest_call``, rows are within its ``rows``, everything is within the context."""
    plan = next(plan for plan in PLANS if weights <= plan.weights)
    longest_call, rows = target.longest_call, min(ROWS, target.rows)
    context = graph.context_length
    steps = min(plan.steps, context // 2)
    lengths = dict.fromkeys(min(length, context - steps) for length in plan.prompts)
    texts = []
    for index, (length, text) in enumerate(zip(lengths, TEXTS, strict=False)):
        tokens = _tokens(tokenizer, text, length + steps)
        # The first prompt asks for one row, as a generation does; the second comes in two calls.
        sizes = [length - length // 3, length // 3] if index == 1 else [length]
        prefill = _calls(tokens[:length], sizes, longest_call, 1 if index == 0 else rows)
        decode = [Call((token,), 1) for token in tokens[length:]]
        texts.append(Run(f"text {index + 1}", (*prefill, *decode)))
    probe = _tokens(tokenizer, TEXTS[0], PROBE_TOKENS + 1)
    probes = [
        Run(
            f"cache of {position}",
            (*_calls(probe[:-1], [PROBE_TOKENS], longest_call, min(rows, PROBE_TOKENS)), Call(probe[-1:], 1)),
            Past(position),
        )
        for position in _probed_positions(graph)
    ]
    prompt = _tokens(tokenizer, TEXTS[0], min(GREEDY_PROMPT, context - steps))
    return Runs(tuple(texts), tuple(probes), prompt, steps)


def greedy_run(name: str, prompt: Sequence[int], chosen: Sequence[int]) -> Run:
    """The run whose every logits row is the one that an artifact chose its next token from."""
    return Run(name, (Call(tuple(prompt), 1), *(Call((token,), 1) for token in chosen[:-1])))


def _probed_positions(graph: Graph) -> list[int]:
    """Before, at and behind the edge of each window, and near the end of the context."""
    windows = {node.window for node in graph.attentions if node.window is not None}
    positions = {window + step for window in windows for step in (-1, 0, 1)} | {graph.context_length - 8}
    values = sum(node.kv_heads * node.head_dim for node in graph.attentions) * graph.context_length
    if 2 * 8 * values > LARGEST_PROBED_CACHE:
        return []
    return sorted(position for position in positions if 1 <= position <= graph.context_length - PROBE_TOKENS - 1)


def _tokens(tokenizer: Tokenizer, text: str, count: int) -> tuple[int, ...]:
    """``count`` tokens of a text, which begins anew where it is too short."""
    ids = tokenizer.encode(text, add_special_tokens=True)
    more = tokenizer.encode(text, add_special_tokens=False)
    if not more:
        raise InputError("the tokenizer makes no token of a page of text: there is nothing to verify on")
    while len(ids) < count:
        ids = [*ids, *more]
    return tuple(ids[:count])


def _calls(tokens: Sequence[int], sizes: Sequence[int], longest: int, rows: int) -> list[Call]:
    """Calls of these sizes, cut where one is too long."""
    calls, start = [], 0
    for size in sizes:
        end = start + size
        while start < end:
            stop = min(end, start + longest)
            calls.append(Call(tuple(tokens[start:stop]), min(rows, stop - start)))
            start = stop
    return calls
