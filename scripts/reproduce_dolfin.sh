#!/usr/bin/env bash
# bash scripts/reproduce_dolfin.sh [--dry-run]    # see scripts/reproduce.sh
exec bash "$(dirname "$0")/reproduce.sh" dolfin "$@"
