"Does a built page load anything from the network, and does each of its links lead somewhere?"
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Elements that a browser fetches by itself, and the attribute with the address. A link that a reader clicks may lead anywhere.
LOADS = {"script": "src", "img": "src", "source": "src", "iframe": "src", "embed": "src", "object": "data", "video": "src", "link": "href"}
RELATIONS = {"canonical", "license", "author", "prev", "next", "index", "search"}  # of <link>, which load nothing
IN_STYLE = re.compile(r"(?:url\(|@import\s)\s*[\"']?\s*((?:https?:)?//[^\"')\s]+)")


class Page(HTMLParser):
    "Ids, links and loaded addresses of a page."
    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"): self.links.append(found["href"])
        if tag == "link" and set((found.get("rel") or "").split()) & RELATIONS: return
        if address := found.get(LOADS.get(tag, "")): self.loads.append(address)
        self.loads += IN_STYLE.findall(found.get("style") or "")


def pages(site: Path) -> list[Path]:
    "The theme leaves templates among its static files."
    return sorted(path for path in site.rglob("*.html") if "_static" not in path.relative_to(site).parts)


def is_elsewhere(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def network_loads(site: Path) -> list[str]: # page: address
    "What pages and style sheets would ask the network for."
    found = []
    for path in pages(site):
        text = path.read_text(encoding="utf-8")
        addresses = Page(text).loads + IN_STYLE.findall("".join(re.findall(r"<style.*?</style>", text, flags=re.S)))
        found += [f"{path.relative_to(site)}: {address}" for address in addresses if is_elsewhere(address)]
    for path in sorted(site.rglob("*.css")):
        addresses = IN_STYLE.findall(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(site)}: {address}" for address in addresses]
    return found


def dead_links(site: Path) -> list[str]: # page: address
    "Links and loads within the site that lead nowhere, and anchors that no page has."
    read = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in pages(site)}
    found = []
    for path, page in read.items():
        for address in dict.fromkeys(page.links + page.loads):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc: continue
            target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            is_there = target.is_file() and (not anchor or target not in read or anchor in read[target].ids)
            if not is_there: found.append(f"{path.relative_to(site.resolve())}: {address}")
    return found
