"""ImapFlow, a client for Node.js: what it finds is in imapflow/client.mjs, one line of JSON for each check."""

import json
import os
import pathlib
import shutil

from . import harness
from .harness import check

installed = pathlib.Path(os.environ["CLIENTS_INSTALLED"]) / "imapflow"
package = installed / "node_modules" / "imapflow" / "package.json"
if not package.is_file():
    check("ImapFlow is installed", False, "tests/clients/install.sh installs it")
    harness.end()
harness.begin(
    "imapflow",
    f"ImapFlow {json.loads(package.read_text())['version']}, Node.js "
    + harness.run([harness.tool("node"), "--version"]).stdout.strip(),
)
user = harness.user()
harness.deliver(user, [harness.message(number) for number in range(30)])
here = pathlib.Path(__file__).parent / "imapflow"
# Node.js looks for packages beside the file.
shutil.copy(here / "client.mjs", installed / "client.mjs")


def use(what, options):
    settings = {"user": user, "password": harness.PASSWORD, "lmtp": harness.where("lmtp").text, "what": what, **options}
    result = harness.run(
        [harness.tool("node"), installed / "client.mjs"],
        stdin=json.dumps(settings),
        env={"NODE_EXTRA_CA_CERTS": harness.CERTIFICATE},
    )
    ended = False
    for line in result.stdout.splitlines():
        try:
            item = json.loads(line)
        except ValueError:
            continue
        ended |= "end" in item
        if "check" in item:
            check(f"{what}: {item['check']}", item["good"], item.get("detail", ""))
    check(f"{what}: all was done", ended and result.returncode == 0, result.stdout)


use("imaps", {"host": "localhost", "port": harness.where("imaps").port, "secure": True})
use("imap with STARTTLS", {"host": "localhost", "port": harness.where("imap").port, "secure": False})
harness.end()
