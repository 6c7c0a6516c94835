"""Thunderbird on a screen that nobody sees: reads, deletes, is told of new mail, sends. docs/thunderbird.md is about it.

Not among the clients that are driven without being named: it is large, and a desktop program's keys and windows change.
CLIENTS_SCREENSHOT=FILE.png keeps a picture of the message that it opened.
"""

import contextlib
import email.message
import os
import subprocess
import time

from . import harness
from .harness import check, same

thunderbird = harness.tool("thunderbird")
for program in ("Xvfb", "openbox", "xdotool", "import"):
    harness.tool(program)
harness.begin("thunderbird", harness.run([thunderbird, "--version"]).stdout.strip())
# It is typed on a keyboard whose layout may not have every character.
PASSWORD = "correct horse"
user = f"me@{harness.DOMAIN}"
harness.user("me", password=PASSWORD)
home = harness.directory("home")
profile = harness.directory("profile")


def letter(number, name, subject, text, html=None, attachment=None):
    message = email.message.EmailMessage()
    message["From"] = f"{name} <sender{number}@sender.test>"
    message["To"] = user
    message["Subject"] = subject
    message["Date"] = f"Tue, 14 Oct 2025 12:0{number}:00 +0000"
    message["Message-ID"] = f"<{number}.letter@{harness.DOMAIN}>"
    message.set_content(text)
    if html is not None:
        message.add_alternative(html, subtype="html")
    if attachment is not None:
        message.add_attachment(attachment, maintype="text", subtype="plain", filename="notes.txt")
    return message.as_bytes(policy=message.policy.clone(linesep="\r\n"))


ENGINE = """<h2>Notes</h2><p>Dear all,</p><p>the <b>notes on the engine</b> are enclosed:</p>
<ul><li>an acknowledgement means that the message is on disk,</li><li>a message is stored as it came.</li></ul>"""
letters = [
    letter(0, "Ada Byron", "Notes on the engine", "Dear all,\n\nthe notes are enclosed.\n", ENGINE, b"A note.\n" * 250),
    letter(1, "Grace Hopper", "Compilers, on Friday", "See you at ten.\n"),
    letter(2, "Karl Köhler", "Grüße aus Köln", "Schöne Grüße!\n"),
]

preferences = {
    "mail.accountmanager.accounts": "account1",
    "mail.accountmanager.defaultaccount": "account1",
    "mail.account.account1.identities": "id1",
    "mail.account.account1.server": "server1",
    "mail.identity.id1.fullName": "Me",
    "mail.identity.id1.useremail": user,
    "mail.identity.id1.smtpServer": "smtp1",
    "mail.identity.id1.valid": True,
    "mail.identity.id1.fcc_folder": f"imap://{user.replace('@', '%40')}@{harness.where('imap').host}/Sent",
    "mail.identity.id1.compose_html": False,
    "mail.server.server1.type": "imap",
    "mail.server.server1.hostname": harness.where("imap").host,
    "mail.server.server1.port": harness.where("imap").port,
    "mail.server.server1.userName": user,
    "mail.server.server1.name": user,
    # Neither TLS nor STARTTLS: the server is on this machine. 3 is a password in the clear.
    "mail.server.server1.socketType": 0,
    "mail.server.server1.authMethod": 3,
    "mail.server.server1.login_at_startup": True,
    "mail.smtpservers": "smtp1",
    "mail.smtp.defaultserver": "smtp1",
    "mail.smtpserver.smtp1.type": "smtp",
    "mail.smtpserver.smtp1.hostname": "127.0.0.1",
    "mail.smtpserver.smtp1.port": harness.where("smtp").port,
    "mail.smtpserver.smtp1.try_ssl": 0,
    "mail.smtpserver.smtp1.authMethod": 1,
    # Nothing that asks, tells or calls home.
    "mail.provider.suppress_dialog_on_startup": True,
    "mail.shell.checkDefaultClient": False,
    "mail.spotlight.firstRunDone": True,
    "mail.rights.version": 1,
    "mail.warn_on_send_accel_key": False,
    "mailnews.start_page.enabled": False,
    "mailnews.start_page_override.mstone": "ignore",
    "app.update.auto": False,
    "datareporting.healthreport.uploadEnabled": False,
    "datareporting.policy.dataSubmissionPolicyBypassNotification": True,
    "network.connectivity-service.enabled": False,
}


def literal(value):
    return (
        {True: "true", False: "false"}[value]
        if isinstance(value, bool)
        else f'"{value}"' if isinstance(value, str) else value
    )


(profile / "user.js").write_text("".join(f'user_pref("{k}", {literal(v)});\n' for k, v in preferences.items()))


@contextlib.contextmanager
def running(command, **options):
    process = subprocess.Popen(
        command, stdout=options.pop("stdout", subprocess.DEVNULL), stderr=subprocess.DEVNULL, **options
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def stored(name="INBOX"):
    """Subjects and flags. (The harness logs in with a password of its own.)"""
    return {message.id: message for message in harness.stored(user, name, PASSWORD)}


def use_it(display):
    environment = {
        **os.environ,
        "DISPLAY": display,
        "HOME": str(home),
        "MOZ_LOG": "IMAP:5,timestamp",
        "MOZ_LOG_FILE": str(harness.directory() / "imap.log"),
    }

    def xdotool(*arguments, timeout=60):
        return subprocess.run(["xdotool", *arguments], env=environment, timeout=timeout, capture_output=True, text=True)

    def window(title):
        """Waits for a window and puts it in front."""
        found = xdotool("search", "--sync", "--onlyvisible", "--name", title).stdout.split()
        xdotool("windowactivate", "--sync", found[-1])
        return found[-1]

    with running(["openbox"], env=environment), running([thunderbird, "--profile", profile], env=environment):
        window("Enter your password")
        xdotool("type", "--delay", "20", PASSWORD)
        xdotool("key", "Return")
        window("Inbox - ")

        def opened(number):
            return "\\Seen" in stored()[f"<{number}.letter@{harness.DOMAIN}>"].flags

        # N goes to the next message that has not been read.
        limit = time.monotonic() + 30
        while not opened(0) and time.monotonic() < limit:
            xdotool("key", "n")
            time.sleep(1)
        check("it opens a message, which is seen then", opened(0))
        if "CLIENTS_SCREENSHOT" in os.environ:
            time.sleep(2)
            subprocess.run(
                ["import", "-window", "root", os.environ["CLIENTS_SCREENSHOT"]],
                env=environment,
                check=True,
                timeout=30,
            )
        xdotool("key", "Delete")
        gone = harness.wait_until("Delete moves it to Trash", lambda: len(stored("Trash")) == 1)
        if gone:
            key, message = next(iter(stored("Trash").items()))
            same(
                "Delete moves it to Trash, byte for byte",
                (key, message.raw[-len(letters[0]) :] == letters[0], key in stored()),
                (f"<0.letter@{harness.DOMAIN}>", True, False),
            )
        log = harness.directory() / "imap.log.moz_log"
        late = letter(5, "Late", "While it idles", "Hello\n")
        harness.deliver(user, [late])
        told = "it is told of new mail while it idles, and fetches it"
        if harness.wait_until(told, lambda: "Subject: While it idles" in log.read_text(errors="replace")):
            check(told, True)
        subprocess.run(
            [thunderbird, "--profile", profile, "-compose", f"to='{user}',subject='Written here',body='Hello'"],
            env=environment,
            timeout=30,
            check=False,
        )
        window("Write: Written here")
        xdotool("key", "ctrl+Return")
        sent = harness.wait_until(
            "it sends a message", lambda: any(b"Subject: Written here" in m.raw for m in stored().values())
        )
        if sent and harness.wait_until("it keeps a copy in Sent", lambda: stored("Sent")):
            check("it sends a message and keeps a copy in Sent", True)


harness.deliver(user, letters)
read_end, write_end = os.pipe()
with running(
    ["Xvfb", "-displayfd", str(write_end), "-screen", "0", "1280x800x24", "-nolisten", "tcp"], pass_fds=[write_end]
):
    use_it(":" + os.read(read_end, 20).decode().strip())
harness.end()
