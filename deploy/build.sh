#!/usr/bin/env bash
# Build the images without a docker engine, and try them: deploy/build.sh [TARGET...]   (default: serve-cpu)
#
# Needs root, buildah and debootstrap (Debian: apt install buildah debootstrap). The base is made with debootstrap, so
# nothing is pulled. Each image is then tried: `tta check` on a bundle, and a daemon that runs from the built root file
# system as uid 10001, answers /readyz, classifies pictures and stops. Sizes are printed at the end.
#
#   BUNDLE=model.tta      to try the images with; without it they are only built
#   PICTURES=folder       to classify
#   BUILD_ARGS="..."      more of buildah's arguments, as "--volume /etc/pip.conf:/etc/pip.conf:ro" for a mirror
#   SUITE=bookworm        Debian's, of the base
set -euo pipefail
cd "$(dirname "$0")/.."
targets=("${@:-serve-cpu}")
suite=${SUITE:-bookworm}
work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
export BUILDAH_ISOLATION=chroot
for tool in buildah debootstrap; do
  command -v "$tool" > /dev/null || { echo "deploy/build.sh: $tool is missing: apt install $tool" >&2; exit 2; }
done

if ! buildah inspect --type image localhost/tta-base > /dev/null 2>&1; then
  echo "+ base: debootstrap $suite" >&2
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$work/base" > "$work/debootstrap.log" \
    || { tail -20 "$work/debootstrap.log" >&2; exit 1; }
  rm -rf "$work/base/var/cache/apt" "$work/base/var/lib/apt/lists"/* "$work/base/usr/share/doc" "$work/base/usr/share/man"
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$work/base" / > /dev/null
  buildah commit --quiet --rm "$container" localhost/tta-base > /dev/null
  rm -rf --one-file-system "$work/base"
fi

try() { # IMAGE: run a daemon from its root file system, read-only and as its user, as a container engine would
  local image=$1 container root port=$((20000 + RANDOM % 20000)) state="" daemon
  container=$(buildah from "$image")
  root=$(buildah mount "$container")
  cp "$BUNDLE" "$root/models/model.tta"
  chmod a+r "$root/models/model.tta"
  [ -z "${PICTURES:-}" ] || cp -r "$PICTURES" "$root/models/pictures"
  mount --bind "$root" "$root"
  mount -o remount,bind,ro "$root"
  mount -t proc proc "$root/proc"
  mount --bind /dev "$root/dev"
  mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
  mount -t tmpfs -o uid=10001,gid=10001,mode=0700 tmpfs "$root/state"
  inside=(chroot --userspec=10001:10001 "$root" env PATH=/opt/venv/bin:/usr/bin:/bin HOME=/home/tta)
  "${inside[@]}" tta check /models/model.tta || true
  "${inside[@]}" tta serve --config /etc/tta/docker.yaml --set "server.endpoint=tcp://127.0.0.1:$port" \
    --set "daemon.control=tcp://127.0.0.1:$((port + 1))" --set "daemon.http=127.0.0.1:$((port + 2))" \
    --set security.plaintext=true 2> "$work/daemon.log" &
  daemon=$!
  for _ in $(seq 300); do
    "${inside[@]}" python3 -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$((port + 2))/readyz')" \
      2> /dev/null && state=ready && break
    kill -0 "$daemon" 2> /dev/null || break
    sleep 0.2
  done
  if [ "$state" = ready ]; then
    [ -z "${PICTURES:-}" ] || "${inside[@]}" tta predict /models/pictures --endpoint "tcp://127.0.0.1:$port" || state=""
    "${inside[@]}" tta status --control "tcp://127.0.0.1:$((port + 1))" || state=""
  fi
  kill -TERM "$daemon" 2> /dev/null || true
  wait "$daemon" || state=""
  [ "$state" = ready ] || { tail -5 "$work/daemon.log" >&2; echo "$image: the daemon failed" >&2; }
  umount -R "$root"
  buildah umount "$container" > /dev/null
  buildah rm "$container" > /dev/null
  [ "$state" = ready ] && echo "$image: served from its read-only root file system, and stopped"
}

revision=$(git rev-parse --short HEAD 2> /dev/null || echo unknown)
for target in "${targets[@]}"; do
  echo "+ image: tta:$target" >&2
  # shellcheck disable=SC2086
  buildah bud --layers --format docker --target "$target" --tag "localhost/tta:$target" \
    --build-arg BASE=localhost/tta-base --build-arg REVISION="$revision" ${BUILD_ARGS:-} . > "$work/$target.log" 2>&1 \
    || { tail -30 "$work/$target.log" >&2; exit 1; }
  [ -z "${BUNDLE:-}" ] || try "localhost/tta:$target"
done
for target in "${targets[@]}"; do
  container=$(buildah from "localhost/tta:$target")
  root=$(buildah mount "$container")
  printf '%-12s %5d MB\n' "$target" "$(du -sxm "$root" | cut -f1)"
  buildah umount "$container" > /dev/null
  buildah rm "$container" > /dev/null
done
