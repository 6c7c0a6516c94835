#!/usr/bin/env python3
"""What a store takes on disk while mail comes and goes, with compaction by itself, beside what its live messages take.

usage: tests/scripts/steady.py [ROUNDS] [MESSAGES] [BINARIES]
  ROUNDS    of deliveries, each followed by the expunge of as many messages, chosen at random; 8 if absent
  MESSAGES  delivered in each round, 4,000 octets each, all different; 40000 if absent. Three times as many are there at first
  BINARIES  where posthaste and posthaste-bench are; target/release if absent
Prints what `du` says at the end of each round, and after `posthaste compact --wait`, which leaves nothing that is dead.
"""

import os
import random
import socket
import subprocess
import sys
import tempfile
import time

HASH = "$argon2id$v=19$m=8,t=1,p=1$1G+pEhhfcplxx7ANWGl9Mw$3hgdr4Ec6oP3hBCC74tCA/2DTjt4Y3iXPhtXJ2AaZkg"
USERS = 16
SEED = 1


def start(binaries, data):
    arguments = ["serve", "--data", data, "--workers", "1", "--plaintext-auth"]
    sizes = ["--set", "store.segment_size_bytes=33554432", "--set", "store.reserve_bytes=0"]
    listeners = ["--listen", "imap=127.0.0.1:0", "--listen", "lmtp=127.0.0.1:0"]
    command = [f"{binaries}/posthaste", *arguments, *sizes, *listeners]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    ports = {}
    for line in server.stdout:
        if line.startswith("listening"):
            _, protocol, address = line.split()
            ports[protocol] = int(address.rsplit(":", 1)[1])
        if line.startswith("ready"):
            return server, ports
    raise SystemExit("the server did not start")


def expunge(port, user, count, chance):
    """Expunges `count` messages, at random."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        answers = connection.makefile("rb")

        def run(command):
            connection.sendall(b"a " + command.encode() + b"\r\n")
            lines = []
            while not (lines and lines[-1].startswith(b"a ")):
                lines.append(answers.readline())
                if not lines[-1]:
                    raise SystemExit("the server closed the connection")
            if not lines[-1].startswith(b"a OK"):
                raise SystemExit(f"{command[:60]}: {lines[-1]!r}")
            return lines

        answers.readline()
        run(f"LOGIN user{user}@example.org bench")
        exists = next(int(line.split()[1]) for line in run("SELECT INBOX") if line.endswith(b" EXISTS\r\n"))
        chosen = sorted(chance.sample(range(1, exists + 1), min(count, exists)))
        for first in range(0, len(chosen), 1000):
            numbers = ",".join(map(str, chosen[first : first + 1000]))
            run(f"STORE {numbers} +FLAGS.SILENT (\\Deleted)")
        run("CLOSE")


def used(data):
    return int(subprocess.run(["du", "-s", "-B1", data], capture_output=True, check=True, text=True).stdout.split()[0])


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    messages = int(sys.argv[2]) if len(sys.argv) > 2 else 40_000
    binaries = os.path.realpath(sys.argv[3] if len(sys.argv) > 3 else "target/release")
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    with tempfile.TemporaryDirectory() as work:
        data = f"{work}/store"
        with open(f"{work}/users", "w") as users:
            bench = [f"{binaries}/posthaste-bench", "users", "--user-count", str(USERS), "--password", HASH]
            subprocess.run(bench, stdout=users, check=True)
        add = [f"{binaries}/posthaste", "user", "import", f"{work}/users", "--data", data, "--set", "store.shards=1"]
        subprocess.run(add, stdout=subprocess.DEVNULL, check=True)
        server, ports = start(binaries, data)

        def deliver(count):
            lmtp = f"127.0.0.1:{ports['lmtp']}"
            what = ["--user-count", str(USERS), "--size", "4000", "--distinct", "--connections", "32", "--rate", "4000"]
            command = [f"{binaries}/posthaste-bench", "deliver", "--lmtp", lmtp, *what, "--messages", str(count)]
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)

        deliver(3 * messages)
        time.sleep(5)
        print(f"{used(data) / 1e6:.0f} MB before anything is expunged", flush=True)
        taken = []
        for number in range(rounds):
            deliver(messages)
            for user in range(1, USERS + 1):
                expunge(ports["imap"], user, messages // USERS, chance)
            taken.append(used(data))
            print(f"{taken[-1] / 1e6:.0f} MB after round {number + 1}", flush=True)
        compact = [f"{binaries}/posthaste", "compact", "--wait", "--data", data]
        subprocess.run(compact, stdout=subprocess.DEVNULL, check=True)
        live = used(data)
        server.terminate()
        server.wait()
        late = taken[len(taken) // 2 :]
        print(f"{live / 1e6:.0f} MB after compact --wait; the later rounds had {max(late) / live:.2f} times as much at most")


main()
