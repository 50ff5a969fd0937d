"""projects/bench: a row is made of medians, and the script leaves its report."""

import json
import os
import subprocess
import sys

from tests.common import ROOT, TempDirTestCase

BENCH = ROOT / "projects" / "bench"


class TestBench(TempDirTestCase):
    def python(self, *args):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (BENCH, ROOT)))}
        return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=self.folder, env=env)

    def test_a_row_and_a_report(self):
        code = ("from measure import Case, row; r = row(Case('w', 'u', 12, None, 'p', None, ('limit', lambda: 8.0)), 'x', [3, 1, 2, 9, 2], [3, 4, 9]); "
                "print(r.work, r.ours, r.theirs, r.ratio, r.spread, r.limit)")
        self.assertEqual(self.python("-c", code).stdout, "w: x 6.0 3.0 2.0 4.0 75% of the limit\n")
        run = self.python(BENCH / "bench.py", "--quick", "--only=vocabulary")
        self.assertEqual(run.returncode, 0, run.stderr)
        row, = json.loads((self.folder / "out" / "bench" / "results.json").read_text())["rows"]
        self.assertAlmostEqual(row["ratio"], row["ours"] / row["theirs"])
        self.assertTrue(row["ours_mb"] > 50 and row["theirs_mb"] > 50)
        self.assertIn(f"| {row['work']} | vocabularies/s |", run.stdout)
        self.assertTrue((self.folder / "out" / "bench" / "bench.png").exists())
        self.assertIn("has ['speed']; there are train,", self.python(BENCH / "bench.py", "--only=speed").stderr)
