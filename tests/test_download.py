"""Where downloads are kept. test_weights.py has the downloads, from a server that misbehaves."""

import os
from pathlib import Path
from unittest import mock

from mingpt.download import home
from tests.common import TempDirTestCase


class TestHome(TempDirTestCase):
    def test_the_environment_names_the_folder(self):
        with mock.patch.dict(os.environ, {"MINGPT_HOME": str(self.folder)}):
            self.assertEqual(home(), self.folder)

    def test_by_default_it_is_in_the_users_cache(self):
        with mock.patch.dict(os.environ):
            os.environ.pop("MINGPT_HOME", None)
            self.assertEqual(home(), Path.home() / ".cache" / "mingpt")
