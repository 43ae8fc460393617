"""The options of a generation that ``run`` and ``chat`` share."""

from typing import Annotated

import typer

__all__ = ["MaxNewTokens", "MinP", "RepetitionPenalty", "Seed", "Stop", "Temperature", "TopK", "TopP"]

MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", metavar="N", help="Default: to a stop or the end of the context.")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", metavar="T", help="0 is greedy; unset sampling is the model's own.")
]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="K", help="Only the K most likely tokens.")]
TopP = Annotated[
    float | None, typer.Option("--top-p", metavar="P", help="Only the most likely tokens up to P together.")
]
MinP = Annotated[
    float | None, typer.Option("--min-p", metavar="P", help="Only tokens of P times the best one's chance.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", metavar="X", help="Above 1 makes what was there less likely.")
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="S", help="A text that ends the answer; repeatable.")]
