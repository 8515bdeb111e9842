#!/usr/bin/env bash
# Prepares a corpus of long documents: the C files of the Linux kernel that have 32 KiB or more, one document each, from
# Debian's source package. Needs a Debian-based system and no root; nothing is installed but foxdist. Called again, it
# continues where it stands. The text is licensed under GPL-2.0.
#
#   bash launch/corpus_linux.sh [--folders DIR ...] [--package NAME | --tree DIR] [option of prepare ...]
#
#   --folders DIR ...  only these of the kernel's folders, for example: kernel mm fs drivers/net
#   --package NAME     a package of your choice; default: what `linux-source` stands for, the newest that apt knows
#   --tree DIR         a kernel tree of your own, on any system; nothing is downloaded
#
# Other options go to `python -m foxdist.data prepare` and win over those at the end of this file, for example:
#   bash launch/corpus_linux.sh --sequence-length 65536 --train-bpe 32000 --output data/linux-64k
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

folders=(.) package='' tree='' options=()
while [ $# -gt 0 ]; do
  case $1 in
    --folders)
      folders=()
      while [[ $# -gt 1 && $2 != -* ]]; do
        folders+=("$2")
        shift
      done
      ;;
    --package) package=${2:?--package needs a name} && shift ;;
    --tree) tree=${2:?--tree needs a folder} && shift ;;
    *) options+=("$1") ;;
  esac
  shift
done

[ -z "$tree" ] || [ -z "$package" ] || fail "--package and --tree exclude each other; give one of them"
if [ -z "$tree" ]; then
  for program in apt-get apt-cache dpkg-deb xz; do
    command -v "$program" >/dev/null || fail "$program not found; a Debian-based system with xz-utils is required to" \
      "fetch the source; elsewhere unpack a release of https://kernel.org and name it: bash $0 --tree DIR"
  done
fi

extra=
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# Into $tree, the package's .c and .h files. They lie in $tree.unfinished until they are whole.
fetch() {
  local work=$tree.unfinished archive
  mkdir -p "$work"
  exec {lock}>"$work/lock"
  flock --nonblock "$lock" || fail "$work: another call is fetching into it; must be one at a time; wait for it"
  # Checks what is there already: a whole file is kept, half of one is completed.
  (cd "$work" && apt-get download "$package") || fail "--package $package: not downloaded; apt must know it and reach" \
    "its server; see apt's own message above"
  rm -rf "$work/package" "$work/tree"
  dpkg-deb --extract "$(printf '%s\n' "$work"/*.deb | sort --version-sort | tail -n 1)" "$work/package"
  archive=$(find "$work/package" -type f -name 'linux-source-*.tar*')
  [ -f "$archive" ] || fail "--package $package: holds no linux-source-*.tar; must be a linux-source-VERSION package;" \
    "apt-cache search ^linux-source- lists them"
  echo "unpacking the C files of $package into $tree"
  mkdir "$work/tree"
  tar --extract --file "$archive" --directory "$work/tree" --strip-components 1 --wildcards '*.c' '*.h'
  mv --no-target-directory "$work/tree" "$tree"
  rm -r "$work"
}

if [ -z "$tree" ]; then
  if [ -z "$package" ]; then
    package=$(LC_ALL=C apt-cache depends linux-source 2>/dev/null | sed -n 's/^ *Depends: //p')
    [ -n "$package" ] || fail "--package: apt knows no linux-source to take it from; must have its lists of packages;" \
      "run once, as root: apt-get update"
  fi
  tree=$root/data/$package
  if [ ! -d "$tree" ]; then fetch; fi
fi

inputs=()
for folder in "${folders[@]}"; do inputs+=("$tree/$folder"); done
python -m foxdist.data prepare "${inputs[@]}" --output "$root/data/linux" --sequence-length 16384 \
  --include '*.c' --min-bytes 32768 "${options[@]}"
