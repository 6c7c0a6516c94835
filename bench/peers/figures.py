"""Medians and ratios of what was measured."""

import dataclasses
import statistics


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of the rounds with the smallest and the largest."""

    median: float
    low: float
    high: float
    rounds: int


def spread(values):
    """None if there are no values."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values), len(values))


def value(record, field):
    """A field of a record; a dot leads into it. None if it is not there."""
    for name in field.split("."):
        if not isinstance(record, dict) or name not in record:
            return None
        record = record[name]
    return record


class Runs:
    """The records of all rounds."""

    def __init__(self, records):
        self.records = [record for record in records if "workload" in record]

    def workloads(self):
        """In the order in which they were run first."""
        return list(dict.fromkeys(record["workload"] for record in self.records))

    def servers(self, workload=None):
        return list(dict.fromkeys(record["server"] for record in self.records if workload in (None, record["workload"])))

    def of(self, workload, server):
        return [record for record in self.records if record["workload"] == workload and record["server"] == server]

    def good(self, workload, server):
        """Those in which something was done."""
        return [record for record in self.of(workload, server) if not record.get("failed") and record.get("operations")]

    def spread(self, workload, server, field):
        return spread([value(record, field) for record in self.good(workload, server)])

    def rounds(self):
        return len({record["round"] for record in self.records})

    def least(self, workload, field, servers):
        """The server whose median of a field is the smallest, or None."""
        medians = self.medians(workload, field, servers)
        return min(medians, key=medians.get) if medians else None

    def most(self, workload, field, servers):
        """The server whose median of a field is the largest, or None."""
        medians = self.medians(workload, field, servers)
        return max(medians, key=medians.get) if medians else None

    def medians(self, workload, field, servers):
        """Without the servers that have none."""
        spreads = {server: self.spread(workload, server, field) for server in servers}
        return {server: found.median for server, found in spreads.items() if found}

    def ratio(self, workload, field, above, below):
        """How many times one server's figure is another's: of pairs of the same round, so that a slow minute hits both."""
        pairs = []
        for round_number in {record["round"] for record in self.records}:
            found = []
            for server in (above, below):
                same = [record for record in self.good(workload, server) if record["round"] == round_number]
                found.append(value(same[0], field) if same else None)
            if found[0] is not None and found[1]:
                pairs.append(found[0] / found[1])
        return spread(pairs)
