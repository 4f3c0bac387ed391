# SPDX-License-Identifier: Apache-2.0
"""The `vosops` command: one small file per subcommand."""

import typer

from .ablate import ablate
from .bench import bench
from .data import data
from .dataset import dataset
from .demo import demo
from .doctor import doctor
from .eval import evaluate
from .models import models
from .segment import segment
from .train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.command()(doctor)
app.command()(demo)
app.command()(segment)
app.command("eval")(evaluate)
app.add_typer(dataset, name="dataset")
app.command()(ablate)
app.command()(models)
app.add_typer(data, name="data")
app.command()(train)
app.command()(bench)
