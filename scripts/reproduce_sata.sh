#!/usr/bin/env bash
# bash scripts/reproduce_sata.sh [--dry-run]    # see scripts/reproduce.sh
exec bash "$(dirname "$0")/reproduce.sh" sata "$@"
