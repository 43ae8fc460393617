"""Texts that artifacts are verified on: prose, a program, and what is neither. Real models see such text, and its
activations are not those of random tokens."""

__all__ = ["TEXTS"]

_PROSE = """\
The ferry left a little after six, when the fog was still lying on the water and the lamps along the quay had not been
put out. There were four of us on deck: a schoolteacher on her way to the mainland for an eye examination, two brothers
who carried a beehive between them in a wooden crate, and myself. Nobody spoke for the first half hour. Then the older
of the brothers, who had been listening to the crate with his ear against the boards, said that the bees were quieter
than he liked. "They know that they are over water," the teacher answered. "My grandfather used to say that bees keep a
map of every hill they have seen, and that the sea has no hills." The brother thought about this. He asked how far it
still was, and the mate, coming past with a rope, told him eleven miles, or an hour and a quarter if the wind did not
turn. By the time the sun stood above the lighthouse the fog had gone, the brothers had opened the vents of the crate by
the width of two fingers, and the whole deck smelled faintly of wax and warm wood. I have taken that crossing perhaps
thirty times since then, in better weather and in worse, but whenever someone asks me what it is like, I think of the
man kneeling beside the crate, listening, with his hat in his hand, and of how carefully the others walked around him.
"""

_PROGRAM = '''\
import csv
import statistics
from collections import defaultdict
from pathlib import Path


class Station:
    """A weather station: its name, its height in metres, and one temperature a day."""

    def __init__(self, name, height):
        self.name = name
        self.height = height
        self.temperatures = []

    def add(self, value):
        if not -90.0 <= value <= 60.0:
            raise ValueError(f"{self.name}: {value} is not a temperature")
        self.temperatures.append(value)

    def mean(self):
        return statistics.fmean(self.temperatures) if self.temperatures else None


def read_stations(path: Path) -> dict[str, Station]:
    stations = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            station = stations.setdefault(row["name"], Station(row["name"], float(row["height"])))
            for key, value in row.items():
                if key.startswith("day") and value:
                    station.add(float(value))
    return stations


def by_height(stations, step=500):
    groups = defaultdict(list)
    for station in stations.values():
        groups[int(station.height // step) * step].append(station)
    return {height: sorted(group, key=lambda s: s.name) for height, group in sorted(groups.items())}


if __name__ == "__main__":
    for height, group in by_height(read_stations(Path("stations.csv"))).items():
        for station in group:
            print(f"{height:>6} m  {station.name:<20} {station.mean():6.2f}")
'''

_CONVERSATION = """\
User: How do I keep basil alive on a windowsill through the winter?
Assistant: Give it as much light as you can, at least six hours a day, and keep it away from cold glass at night. Water
it when the top centimetre of the soil is dry, always from below, and pour off what is left after twenty minutes.
User: Mine has black spots on the lower leaves. Is that from the cold?
Assistant: Usually yes: below about 10 °C the leaves turn dark and limp within a day. If the spots have a yellow edge
it is more likely a fungus, and then the leaves must go. Cut the stem above the next pair of healthy leaves.
User: And can I still eat the rest? I wanted to make pesto on Saturday, for eight people.
Assistant: The healthy leaves are fine. For eight people you need roughly 160 g of leaves, 80 g of pine nuts, 120 g of
Parmesan, 3 cloves of garlic and 200 ml of olive oil; one plant gives perhaps 30 g, so buy three bunches as well.
User: What would that cost? I have 20 euros.
Assistant: 3 x 1.99 for the basil, 4.49 for the nuts, about 4.20 for the cheese: 14.66, and you still have 5.34 left.
User: Great. Danke schön, das hilft mir sehr! One last question: does it freeze well?
Assistant: Gern geschehen! Yes, in small jars with a layer of oil on top, for about three months; leave out the cheese
and stir it in after thawing. Guten Appetit!
"""

_NOTES = """\
# Sitzungsprotokoll / compte rendu / minutes, 2024-03-14 09:30-11:05

1. **Budget.** Übertrag aus 2023: 12.480,50 EUR; Ausgaben bis Februar 3.117,25 EUR (24,98 %). Angenommen mit 7:1:2.
2. **Travaux.** Le toit de l'école sera réparé avant l'été ; le devis (n° 2024/017-B) s'élève à 48 300 € hors taxes.
3. **Web.** `https://example.org/api/v2/items?id=42&sort=-date` answers 503 since Tuesday; see <ops@example.org>.

| day | visitors | Δ     | note        |
|-----|---------:|------:|-------------|
| Mo  |    1,204 | +3.1% |             |
| Tu  |      987 | -18%  | strike      |
| We  |    1,560 | +58%  | school trip |

{"event": "export", "ok": true, "bytes": 287309824, "sha256": "9f86d081884c7d65", "tags": ["int4", "int8", null]}
Формула: E = mc², а 東京 лежит на 35°41′ с. ш.; naïve café, ½ + ¼ = ¾, 5 × 7 = 35, x₁ ≤ x₂, ∑aᵢ → ∞.
$ grep -rn "TODO" src/ | wc -l
17
Next meeting: 2024-04-11, 09:30, room B.204. Bring: laptop, the signed form (2x), and - please! - the missing keys.
"""

TEXTS: tuple[str, ...] = (_CONVERSATION, _PROGRAM, _PROSE, _NOTES)
