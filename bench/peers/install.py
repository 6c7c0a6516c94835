"""Installs the peers from Debian's packages.

The packages of Dovecot and Cyrus exclude each other, because both want to be the machine's IMAP server. So Dovecot is installed, and
Cyrus is unpacked into a directory beside it and run from there; only the libraries that it needs are installed.
"""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess

DOVECOT_PACKAGES = ["dovecot-core", "dovecot-imapd", "dovecot-lmtpd", "dovecot-pop3d"]
CYRUS_PACKAGES = ["cyrus-common", "cyrus-imapd", "cyrus-pop3d"]
# What Cyrus' packages ask for and its server processes do without.
NOT_NEEDED = re.compile(r"cyrus-|default-mta|exim|postfix|debconf|lsb-base|adduser|db-util|gawk|e2fsprogs|netbase|perl")
POLICY = pathlib.Path("/usr/sbin/policy-rc.d")


def dependencies(text):
    """Names of the packages in a Depends field, the first of each choice, without what is not needed."""
    names = []
    for part in text.replace("\n", " ").split(","):
        name = part.split("|")[0].split("(")[0].strip().split(":")[0]
        if name and not NOT_NEEDED.match(name) and name not in names:
            names.append(name)
    return names


@contextlib.contextmanager
def services_stay_off():
    """Keeps packages from starting their services (invoke-rc.d(8): 101 forbids it)."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def apt_get(*arguments, **options):
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    subprocess.run(["apt-get", *arguments], check=True, env=environment, **options)


def unpack(packages, directory):
    """Downloads packages and unpacks them below `directory`; returns what they depend on."""
    archives = directory / "packages"
    archives.mkdir(parents=True, exist_ok=True)
    for old in archives.glob("*.deb"):
        old.unlink()
    apt_get("download", *packages, cwd=archives)
    needed = []
    for archive in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", archive, directory], check=True)
        depends = subprocess.run(["dpkg-deb", "-f", archive, "Depends"], check=True, capture_output=True, text=True).stdout
        needed += [name for name in dependencies(depends) if name not in needed]
    return needed


def install(cyrus_root):
    """Installs Dovecot and unpacks Cyrus to `cyrus_root`. Needs root and Debian's archive."""
    apt_get("update")
    with services_stay_off():
        apt_get("install", "-y", "--no-install-recommends", *DOVECOT_PACKAGES)
    if shutil.which("systemctl"):
        # Whatever an earlier installation left running. There may be no such unit, or no systemd that runs.
        for unit in ("dovecot.service", "dovecot.socket"):
            subprocess.run(["systemctl", "disable", "--now", unit], check=False, capture_output=True)
    cyrus_root.mkdir(parents=True, exist_ok=True)
    needed = unpack(CYRUS_PACKAGES, cyrus_root)
    with services_stay_off():
        # What the machine has stays as it is.
        apt_get("install", "-y", "--no-install-recommends", "--no-upgrade", *needed)
