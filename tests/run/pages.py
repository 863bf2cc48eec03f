"""A page that a run has written, taken apart; and a row that it was written from."""

from html.parser import HTMLParser


def evaluation(step, **numbers):
    return {"step": step, "phase": "eval", **numbers}


class Page(HTMLParser):
    """The tags and attributes of a page, and the rows of its tables as texts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.rows, self.best = [], [], [], []
        self.open_cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.open_cell = True
            if ("class", "best") in attrs:
                self.best.append((self.rows[-1][0], len(self.rows[-1]) - 1))

    def handle_endtag(self, tag):
        self.open_cell = self.open_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.open_cell:
            self.rows[-1][-1] = (self.rows[-1][-1] + " " + data).strip()

    def row(self, first):
        (row,) = (row for row in self.rows if row[0].startswith(first))
        return row[1:]


def pair_row(step, index, chosen_reward, rejected_reward, objective="dpo", **texts):
    texts = {"prompt": f"Prompt {index}", "chosen": f"Good {index}", "rejected": f"Bad {index}"} | texts
    rewards = {"chosen_reward": chosen_reward, "rejected_reward": rejected_reward}
    return {"step": step, "phase": "pairs", "index": index, "objective": objective, **texts, **rewards}


def preference_rows(objective="dpo", *, phase=None, steps=4):
    """Metrics of a run of one objective, or of its part in a joint one: an evaluation before and after its steps."""
    rows = []
    for step in range(1, steps + 1):
        numbers = {"accuracy": 0.5 + 0.1 * step, "margin_mean": 0.2 * step}
        numbers |= {"chosen_reward": 0.1 * step, "rejected_reward": -0.1 * step}
        loss = {"loss": 1 / step} if phase is None else {f"{objective}_loss": 1 / step, f"{objective}_coef": 1.0}
        rows.append({"step": step, "phase": phase or objective, **numbers, **loss})
    for step, accuracy in ((0, 0.5), (steps, 0.875)):
        measures = {"accuracy": accuracy, "accuracy_sem": 0.05, "loss": 0.7 - accuracy / 2, "num_pairs": 16.0}
        measures |= {"chosen_reward": accuracy, "rejected_reward": -accuracy, "margin_mean": 2 * accuracy}
        rows.append(evaluation(step, **{f"{objective}/{name}": value for name, value in measures.items()}))
    return rows
