# Sourced by the checks that run a deployment on real engines. They need Linux, root, Debian's packages, and the proxy
# of Go modules. CHECK_IMAGES=pinned takes the images that deploy/Dockerfile and docker-compose.yml pin, from their
# registry. CHECK_IMAGES=stand-ins replaces them by images made here (stand-ins.sh). If it is not set, a try decides,
# and each check prints the answer. What is fetched and built stays in the cache, outside the repository.
set -eu
root=${root:-$(cd "$(dirname "$0")/../.." && pwd)}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/decuwatch/deploy-check
mkdir -p "$cache/bin" "$cache/tmp"
PATH="$cache/bin:$PATH"

say() { printf '\n== %s\n' "$*"; }
ok() { printf '   ok: %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }
indent() { sed 's/^/   /'; }
printed=$cache/tmp/printed.$$
# shown COMMAND... runs a command and prints the beginning of what it prints. $printed keeps it.
shown() {
	"$@" >"$printed" 2>&1 || fail "$*: exit code $?: $(cat "$printed")"
	LC_ALL=C.UTF-8 sed -E -e '21,$d' -e 's/^(.{160}).*/\1/' -e 's/^/   /' "$printed"
	lines=$(wc -l <"$printed")
	[ "$lines" -le 20 ] || echo "   ($lines lines)"
}
# ran COMMAND... is shown, after the command.
ran() {
	printf '   $ %s\n' "$*"
	shown "$@"
}

# documented FILE TEXT [COMMAND] runs a command that a document of docs/ names: TEXT, or COMMAND, which is TEXT with
# values for its placeholders. TestEveryCommandRuns compares these lines with the documents.
documented() {
	printf '   $ %s   (docs/%s)\n' "${3:-$2}" "$1"
	shown eval "${3:-$2}"
}

# eventually SECONDS WHAT COMMAND... repeats a command until it succeeds.
eventually() {
	end=$(($(date +%s) + $1)) what=$2
	shift 2
	until "$@" >/dev/null 2>&1; do
		[ "$(date +%s)" -lt "$end" ] || fail "$what: not in time; $*: $("$@" 2>&1 | tail -n 20)"
		sleep 1
	done
	ok "$what"
}

# need COMMAND=PACKAGE... installs Debian's packages of commands that are missing, and starts no service.
need() {
	[ "$(id -u)" = 0 ] || fail "run this as root: it makes namespaces and mounts"
	missing=
	for pair; do command -v "${pair%%=*}" >/dev/null || missing="$missing ${pair#*=}"; done
	[ -n "$missing" ] || return 0
	policy=/usr/sbin/policy-rc.d
	[ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && trap 'rm -f $policy' EXIT; }
	say "installing$missing"
	apt-get update -q >/dev/null
	DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $missing >/dev/null
}

# isolate ARGUMENT... runs the script again in namespaces of its own: no network but what it makes, and all that it has
# started ends with it.
isolate() {
	if [ -z "${CHECK_ISOLATED:-}" ]; then
		rm -f "$printed"
		CHECK_ISOLATED=1 exec unshare --net --mount --pid --fork --kill-child --mount-proc "$0" "$@"
	fi
	ip link set lo up
	work=$(mktemp -d "$cache/run.XXXXXX")
	printed=$work/printed
	trap 'rm -rf "$work"' EXIT
}

# room refuses to start if the disk has no room for images and volumes.
room() {
	free=$(df --output=avail --block-size=1G "$cache" | tail -n 1)
	[ "$free" -ge 10 ] || fail "only $free GB are free on the disk of $cache, want 10"
}

# decide sets CHECK_IMAGES if it is not set, and keeps the images of each kind apart.
decide() {
	case ${CHECK_IMAGES:-} in
	pinned | stand-ins) why="CHECK_IMAGES says so" ;;
	'')
		store=$cache/try
		if timeout 120 buildah --root "$store" --runroot "$store-run" pull --quiet \
			"$(qualified "$(base DEBIAN)")" >/dev/null 2>&1; then CHECK_IMAGES=pinned why="their registry answers"
		else CHECK_IMAGES=stand-ins why="no registry answers"; fi
		rm -rf "$store" "$store-run"
		;;
	*) fail "CHECK_IMAGES is $CHECK_IMAGES, must be pinned or stand-ins" ;;
	esac
	export CHECK_IMAGES store="$cache/$CHECK_IMAGES"
	mkdir -p "$store/images"
	say "images: $CHECK_IMAGES, because $why"
}

# base NAME prints the base image that deploy/Dockerfile pins.
base() { sed -n "s/^ARG $1_IMAGE=//p" "$root/deploy/Dockerfile"; }
# pinned SERVICE prints the image that docker-compose.yml pins.
pinned() { sed -n "/^  $1:\$/,/^    image:/s/^    image: //p" "$root/docker-compose.yml"; }

# qualified IMAGE prints an image's full name, with its digest in place of the tag.
qualified() {
	name=$1
	case $name in *@*) name=${name%%:*}@${name#*@} ;; esac
	case $name in */*) ;; *) name=library/$name ;; esac
	echo "docker.io/$name"
}

bare() { buildah --root "$store/buildah" --runroot "$store/buildah-run" "$@"; }
there() { bare inspect --type image "localhost/$1" >/dev/null 2>&1; }

# image NAME ARGUMENT... builds an image from a Dockerfile: on standard input with -f -.
image() {
	name=$1
	shift
	TMPDIR="$cache/tmp" bare bud --quiet --layers=false --isolation chroot --network host --tag "localhost/$name" "$@" \
		>/dev/null
}

archive() { echo "$store/images/$(echo "$1" | tr :/ __).tar"; }
# save IMAGE puts an image into a file that docker load takes.
save() {
	rm -f "$(archive "$1")"
	bare push --quiet "localhost/$1" "docker-archive:$(archive "$1").part:$1"
	mv "$(archive "$1").part" "$(archive "$1")"
}

# pull SERVICE... takes the images that docker-compose.yml pins, as check/SERVICE.
pull() {
	for name; do
		bare pull --quiet "$(qualified "$(pinned "$name")")" >/dev/null
		bare tag "$(qualified "$(pinned "$name")")" "localhost/check/$name"
		save "check/$name"
	done
}

# services gets the images beside decuwatch.
services() {
	if [ $CHECK_IMAGES = pinned ]; then pull "$@"; return; fi
	. "$root/deploy/check/stand-ins.sh"
	stand_ins
}

# program builds deploy/Dockerfile: decuwatch:cpu. ARGUMENT... are those of docker build, without the context.
program() {
	case $CHECK_IMAGES in
	pinned) set -- --build-arg GO_IMAGE="$(qualified "$(base GO)")" \
		--build-arg PYTHON_IMAGE="$(qualified "$(base PYTHON)")" \
		--build-arg DEBIAN_IMAGE="$(qualified "$(base DEBIAN)")" "$@" ;;
	*) set -- --pull-never --build-arg GO_IMAGE=localhost/check/golang \
		--build-arg PYTHON_IMAGE=localhost/check/python --build-arg DEBIAN_IMAGE=localhost/check/debian "$@" ;;
	esac
	image decuwatch:cpu "$@" --build-arg VERSION="$(git -C "$root" describe --tags --always --dirty)" \
		--build-arg REVISION="$(git -C "$root" rev-parse HEAD)" --ignorefile "$root/.dockerignore" "$root"
	save decuwatch:cpu
	bare rmi localhost/decuwatch:cpu >/dev/null
}

# engine SERVICE... starts Debian's dockerd, with data of its own, and loads decuwatch:cpu and check/SERVICE.
engine() {
	export DOCKER_HOST="unix://$work/docker.sock" DOCKER_CONFIG="$work/config"
	mkdir -p "$work/config/cli-plugins"
	[ ! -x "$cache/bin/docker-compose" ] ||
		ln -s "$cache/bin/docker-compose" "$work/config/cli-plugins/docker-compose"
	dockerd --host "$DOCKER_HOST" --data-root "$work/docker" --exec-root "$work/exec" --pidfile "$work/docker.pid" \
		>"$work/dockerd.log" 2>&1 &
	dockerd=$!
	trap 'stop_engine' EXIT
	eventually 120 "dockerd $(dockerd --version | cut -d' ' -f3 | tr -d ,) runs in namespaces of its own" docker info
	shown docker load --quiet --input "$(archive decuwatch:cpu)"
	if [ $CHECK_IMAGES = pinned ]; then
		for name; do shown docker load --quiet --input "$(archive "check/$name")"; done
		return
	fi
	shown docker load --quiet --input "$(archive check/services)"
	for name; do
		case $name in
		nats) run='["nats-server"]' user=root ;;
		postgres) run='["postgres-entrypoint"]' user=root ;;
		prometheus) user=nobody run='["prometheus", "--config.file=/etc/prometheus/prometheus.yml",
			"--storage.tsdb.path=/prometheus"]' ;;
		alertmanager) user=nobody run='["alertmanager"]' ;;
		esac
		signal=TERM
		[ $name != postgres ] || signal=INT # as the pinned image has it
		printf 'FROM check/services\nCOPY postgres-entrypoint /usr/local/bin/\nUSER %s\nSTOPSIGNAL SIG%s\nENTRYPOINT %s\n' \
			$user $signal "$(echo "$run" | tr -d '\n\t')" |
			DOCKER_BUILDKIT=0 docker build --quiet --tag "check/$name" --file - "$root/deploy/check" >"$printed" 2>&1 ||
			fail "$(cat "$printed")"
	done
}

stop_engine() {
	status=$?
	docker ps --all --quiet | xargs --no-run-if-empty docker rm --force --volumes >/dev/null 2>&1 || true
	kill "$dockerd" && wait "$dockerd" || true
	[ $status = 0 ] || tail -n 5 "$work/dockerd.log"
	umount -R "$work/docker"/* 2>/dev/null || true
	rm -rf "$work" || true
	exit $status
}
