#!/usr/bin/env bash
# Takes the genome of Escherichia coli 536 (NC_008253) out of Debian's package bowtie-examples and runs genome.py on it.
#
#   bash examples/long_context/genome.sh [options of genome.py; --help lists them]
#
# FASTA=my.fa.gz uses a genome of your own, on any system. The package is downloaded and unpacked, not installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/environment.sh
make_environment examples

fasta=${FASTA:-data/genome/NC_008253.fna.gz}
if [ ! -f "$fasta" ]; then
  if [ -n "${FASTA:-}" ]; then
    echo "FASTA=$FASTA does not exist" >&2
    exit 1
  fi
  if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "this system has no apt-get; set FASTA to a genome of your own (NC_008253 is E. coli 536)" >&2
    exit 1
  fi
  mkdir -p data/genome
  scratch=$(mktemp -d data/genome/.download.XXXXXX)
  trap 'rm -rf "$scratch"' EXIT
  if ! (cd "$scratch" && apt-get -qq download bowtie-examples); then
    echo "apt-get found no package bowtie-examples: run 'apt-get update' as root, or set FASTA to a genome of your own" >&2
    exit 1
  fi
  dpkg-deb -x "$scratch"/bowtie-examples_*.deb "$scratch/unpacked"
  mv "$scratch/unpacked/usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz" "$fasta"
  rm -rf "$scratch"
  trap - EXIT
fi

exec "$VENV/bin/python" examples/long_context/genome.py --fasta "$fasta" "$@"
