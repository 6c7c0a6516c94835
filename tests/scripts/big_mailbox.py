#!/usr/bin/env python3
"""What a mailbox of a million messages takes: SELECT warm and cold, SEARCH, STORE, EXPUNGE of every second message.

usage: tests/scripts/big_mailbox.py [MESSAGES] [BINARIES]
  MESSAGES  1000000 if absent
  BINARIES  where posthaste and posthaste-bench are; target/release if absent
Times are the client's, from the command to its last octet; CPU is the server's meanwhile, all threads. Drops the kernel's caches, so it has to run as
root. Takes some two minutes and 3 GB of disk.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time

HASH = "$argon2id$v=19$m=8,t=1,p=1$1G+pEhhfcplxx7ANWGl9Mw$3hgdr4Ec6oP3hBCC74tCA/2DTjt4Y3iXPhtXJ2AaZkg"
NUMBERS_OF_A_STORE = 7000


class Server:
    def __init__(self, binaries, data):
        arguments = ["serve", "--data", data, "--workers", "1", "--plaintext-auth"]
        listeners = ["--listen", "imap=127.0.0.1:0", "--listen", "lmtp=127.0.0.1:0"]
        self.process = subprocess.Popen(
            [f"{binaries}/posthaste", *arguments, *listeners], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.ports = {}
        for line in self.process.stdout:
            if line.startswith("listening"):
                _, protocol, address = line.split()
                self.ports[protocol] = int(address.rsplit(":", 1)[1])
            if line.startswith("ready"):
                return
        raise SystemExit("the server did not start")

    def cpu_ms(self):
        total = 0
        for task in os.listdir(f"/proc/{self.process.pid}/task"):
            try:
                with open(f"/proc/{self.process.pid}/task/{task}/schedstat") as stat:
                    total += int(stat.read().split()[0])
            except OSError:
                pass
        return total / 1e6

    def memory_kb(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    def stop(self):
        self.process.terminate()
        self.process.wait()


class Client:
    def __init__(self, server):
        self.server = server
        self.socket = socket.create_connection(("127.0.0.1", server.ports["imap"]))
        self.number = 0
        self.read_to(b"* OK")
        self.run("LOGIN user1@example.org bench")

    def read_to(self, start):
        """Reads up to and with the line that begins with `start`."""
        pieces, end = [], b""
        while not (end.endswith(b"\r\n") and end[:-2].rsplit(b"\r\n", 1)[-1].startswith(start)):
            piece = self.socket.recv(1 << 20)
            if not piece:
                raise SystemExit(f"the server closed the connection: {end!r}")
            pieces.append(piece)
            end = (end + piece)[-1000:]
        return b"".join(pieces), end[:-2].rsplit(b"\r\n", 1)[-1]

    def run(self, command, shown=None):
        self.number += 1
        tag = f"a{self.number} ".encode()
        cpu = self.server.cpu_ms()
        begun = time.perf_counter()
        self.socket.sendall(tag + command.encode() + b"\r\n")
        answer, last = self.read_to(tag)
        took = (time.perf_counter() - begun) * 1000
        if not last.startswith(tag + b"OK"):
            raise SystemExit(f"{command[:60]}: {last!r}")
        if shown:
            print(f"{shown:46} {took:9.2f} ms {self.server.cpu_ms() - cpu:9.2f} ms of CPU {len(answer):10} octets", flush=True)
        return answer


def drop_caches():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as drop:
        drop.write("3")


def cold_select(binaries, data, shown):
    for _ in range(3):
        drop_caches()
        server = Server(binaries, data)
        Client(server).run("SELECT INBOX", shown)
        server.stop()


def main():
    messages = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    binaries = os.path.realpath(sys.argv[2] if len(sys.argv) > 2 else "target/release")
    with tempfile.TemporaryDirectory() as work:
        data = f"{work}/store"
        with open(f"{work}/users", "w") as users:
            bench = [f"{binaries}/posthaste-bench", "users", "--user-count", "1", "--password", HASH]
            subprocess.run(bench, stdout=users, check=True)
        add = [f"{binaries}/posthaste", "user", "import", f"{work}/users", "--data", data, "--set", "store.shards=1"]
        subprocess.run(add, stdout=subprocess.DEVNULL, check=True)
        server = Server(binaries, data)
        lmtp = f"127.0.0.1:{server.ports['lmtp']}"
        size = ["--user-count", "1", "--size", "740", "--connections", "32", "--messages", str(messages)]
        print(f"delivering {messages} messages", flush=True)
        deliver = [f"{binaries}/posthaste-bench", "deliver", "--lmtp", lmtp, *size]
        subprocess.run(deliver, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        client = Client(server)
        client.run("SELECT INBOX")
        for _ in range(3):
            client.run("SELECT INBOX", "SELECT")
        before = server.memory_kb()
        others = [Client(server) for _ in range(9)]
        for other in others:
            other.run("SELECT INBOX")
        print(f"memory of nine more sessions: {server.memory_kb() - before} KB", flush=True)
        del others
        for _ in range(3):
            client.run("SEARCH RETURN (COUNT) UNSEEN", "SEARCH RETURN (COUNT) UNSEEN")
        client.run("STORE 1:* +FLAGS.SILENT (\\Flagged)", "STORE 1:* +FLAGS.SILENT")
        client.run("STORE 1:* +FLAGS (\\Answered)", "STORE 1:* +FLAGS with all answers")
        client.run("FETCH 1:* FLAGS", "FETCH 1:* FLAGS")
        client.run("STORE 1:70000 +FLAGS.SILENT (\\Draft)")
        client.run("SEARCH DRAFT", "SEARCH of 70,000 hits")
        server.stop()
        cold_select(binaries, data, "SELECT, cold")
        server = Server(binaries, data)
        client = Client(server)
        client.run("SELECT INBOX")
        for first in range(2, messages + 1, 2 * NUMBERS_OF_A_STORE):
            numbers = range(first, min(first + 2 * NUMBERS_OF_A_STORE, messages + 1), 2)
            client.run(f"STORE {','.join(map(str, numbers))} +FLAGS.SILENT (\\Deleted)")
        client.run("EXPUNGE", "EXPUNGE of every second message")
        for _ in range(3):
            client.run("SELECT INBOX", "SELECT of those that are left")
        server.stop()
        cold_select(binaries, data, "SELECT of those that are left, cold")


main()
