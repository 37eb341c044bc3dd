"""Quotations of erased texts are searched for only where words are shared."""

from hf_clmul.ledger import scan_quotes


def test_only_texts_that_share_words_with_an_erased_one_are_looked_up_in_it(monkeypatch):
    """A scan that compared each text with each erased one took half a minute of a few thousand rows."""
    words = [f"w{i}" for i in range(14)]
    erased, cut = " ".join(words), " ".join(words[2:13])
    strangers = [(f"what is {i}?", " ".join(f"s{i}x{j}" for j in range(12))) for i in range(50)]
    read, plain = [], scan_quotes.plain
    monkeypatch.setattr(scan_quotes, "plain", lambda text: read.append(text) or plain(text))
    quoting = (f"someone said {' '.join(words[:10])}",)
    found = scan_quotes.pieces_of({(erased,): "hash"}, [(" ".join(words[4:]),)], [*strangers, (cut,), quoting])
    pieces = {" ".join(words[i : i + 10]): "hash" for i in range(5)}
    del pieces[" ".join(words[:10])], pieces[" ".join(words[4:])]  # of another text, and of one that is kept
    assert found == pieces and sorted(read) == sorted([erased, cut, quoting[0]])
