#!/usr/bin/env bash
# Fails if an object file in the given folders defines a weak symbol. The linker keeps one definition of a weak symbol
# for the whole extension: an inline function compiled with AVX flags could replace the portable copy, and the extension
# would die of an illegal instruction on a CPU without AVX.
set -euo pipefail

mapfile -t objects < <(find "$@" -name '*.o')
if [ ${#objects[@]} -eq 0 ]; then
  echo "no object files in: $*" >&2
  exit 1
fi
# Capital letters are definitions; u is GNU's unique global, merged over shared libraries as well.
weak=$(nm --demangle --print-file-name --defined-only "${objects[@]}" | awk '/ [WVu] /')
if [ -n "$weak" ]; then
  echo "$weak"
  echo "weak symbols defined in the object files of a tier" >&2
  exit 1
fi
echo "${#objects[@]} object files, no weak definition"
