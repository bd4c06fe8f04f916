"""What the tests of reports read out of a page."""

from html.parser import HTMLParser

VOID = {"meta", "br", "input", "link", "img", "hr"}


class Page(HTMLParser):
    """Collects ids, references and text, and checks that elements close in order."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.references, self.open, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids.extend([attributes["id"]] if "id" in attributes else [])
        self.references.extend((tag, value) for name, value in attrs if name in ("src", "href", "xlink:href"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
