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
