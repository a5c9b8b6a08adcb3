"""What a model answered with its full cache, as texts that it can be given to read with other caches.

    python benchmarks/own_answers.py runs/full -o own.jsonl
    reasonalloc eval --model M --fidelity own --data own.jsonl --question-field prompt --text-field answer ...

Takes a folder of ``reasonalloc eval`` whose study has the method "full". Answers that the length limit cut off are left
out, and all but the first one to a question.
"""

import argparse
import json
from pathlib import Path

from reasonalloc.evaluation.answering import Answer
from reasonalloc.evaluation.store import Store
from reasonalloc.evaluation.study import FULL
from reasonalloc.files import write_atomically


def own_answers(store: Store) -> list[dict[str, str]]:
    """Id, prompt and answer of every question, in the study's order."""
    made = {
        unit.question.id: {"id": unit.question.id, "prompt": unit.question.prompt, "answer": found.text}
        for batch in store.plan()
        for unit in batch
        if unit.cell.method == FULL and unit.sample == 0
        for found in [store.read(unit)]
        if isinstance(found, Answer) and found.finished
    }
    ids = [question.id for questions in store.sets() or () for question in questions.questions]
    return [made[id] for id in ids if id in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    texts = own_answers(Store(options.folder))
    lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    write_atomically(options.output, lines.encode())
    print(f"wrote {options.output}: {len(texts)} texts")


if __name__ == "__main__":
    main()
