"""The ledger's key: it turns examples into hashes that nobody can reverse or guess without it, and signs receipts.
Whoever destroys it makes the ledger anonymous. It knows bytes and files, nothing of events."""

import hmac
import os
import secrets
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from hf_clmul.errors import RunError
from hf_clmul.paths import explained_writes

KEY = "ledger.key"
_SIZE = 32


def key_path(ledger: Path) -> Path:
    return ledger.with_name(KEY)


def read_key(ledger: Path) -> bytes | None:
    """The key beside a ledger, or None if there is none (any more). Raises RunError for a file that is no key."""
    path = key_path(ledger)
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(key) != _SIZE:
        raise RunError(
            f"{path} holds {len(key)} bytes and not {_SIZE}: it is not the ledger's key. Put the right file back, or "
            "remove it: then the ledger is anonymous, and its hashed examples can no longer be recognised."
        )
    return key


def make_key(ledger: Path) -> bytes:
    """The key beside a ledger, made if there is none: 32 random bytes that only the owner may read. Written whole or
    not at all, and never over another."""
    path = key_path(ledger)
    aside = path.with_name(
        f".{KEY}.{secrets.token_hex(4)}.aside"
    )  # a kill may leave it; `recover_folder` clears it away
    with explained_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            try:
                with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(secrets.token_bytes(_SIZE))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
    key = read_key(ledger)
    assert key is not None
    return key


def keyed(key: bytes, text: str) -> str:
    """HMAC-SHA256 of a text, in hex [64]."""
    return hmac.new(key, text.encode(errors="surrogatepass"), sha256).hexdigest()


def key_id(key: bytes) -> str:
    """Names a key without giving anything of it away, so that a wrong one is noticed."""
    return keyed(key, "hf_clmul ledger key")[:16]


def merkle_root(leaves: Iterable[str]) -> str:
    """Root of the hash tree over hashes (hex) in their order, in hex: RFC 6962, section 2.1, leaves and nodes told
    apart."""
    row = [sha256(b"\0" + bytes.fromhex(leaf)).digest() for leaf in leaves]
    if not row:
        return sha256(b"").hexdigest()
    while len(row) > 1:
        pairs = [sha256(b"\1" + row[i] + row[i + 1]).digest() for i in range(0, len(row) - 1, 2)]
        row = pairs + row[len(row) - len(row) % 2 :]  # a last one without a partner moves up
    return row[0].hex()
