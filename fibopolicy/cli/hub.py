"""The command that shares a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from fibopolicy.cli.options import RUN_DIRECTORY


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Send the policy of an evaluated run to the Hugging Face Hub: weights as
    safetensors, configuration, episode results, and a model card with its success
    rates.

    Example: fibopolicy upload runs/lift me/lift --licence mit
    """

    run_directory: RUN_DIRECTORY
    """Run directory."""
    repository: Annotated[Positional[str], arg(metavar="OWNER/NAME")]
    """Model repository; created if it does not exist."""
    licence: str
    """Licence of the policy by the Hub's short name, such as mit or cc-by-4.0. Heed that
    of the demonstrations."""
    private: bool = False
    """Create the repository for its owner only."""

    def run(self) -> None:
        from fibopolicy.evaluation.upload import upload_run

        address = upload_run(
            self.run_directory, self.repository, licence=self.licence, private=self.private
        )
        print(f"{address}\nevaluate it: fibopolicy evaluate hub:{self.repository}")
