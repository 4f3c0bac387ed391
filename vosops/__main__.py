# SPDX-License-Identifier: Apache-2.0
"""`python -m vosops` and the `vosops` script."""


def main() -> None:
    try:
        from vosops.cli import app
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"the vosops command needs the package '{error.name}': pip install 'vosops[apps]'"
        ) from error
    app()


if __name__ == "__main__":
    main()
