"""Where the project's own groups lie: in a checkout a link to conf/, in a wheel the files."""

from pathlib import Path

CONF_DIR = Path(__file__).resolve().parents[1] / "conf"
