# Sourced by lib.sh if no image registry is to be asked: makes Debian by debootstrap, Python and Go on it, and one image
# with the real nats-server, Postgres, Prometheus and Alertmanager. Nothing of it goes into a release.

# stand_ins makes what replaces the images. If what they are made from has changed, they are made again.
stand_ins() {
	need debootstrap=debootstrap
	sources=$store/sources
	mkdir -p "$sources"
	made=$(cat "$root/go.mod" "$root/deploy/check/stand-ins.sh" "$root/deploy/check/fetch-go-tools" | sha256sum)
	[ "$made" != "$(cat "$store/made" 2>/dev/null)" ] || return 0
	if [ ! -f "$sources/debian.tar" ]; then
		say "debootstrap: a stand-in of $(base DEBIAN)"
		mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)
		rm -rf "$sources/debian"
		debootstrap --variant=minbase bookworm "$sources/debian" "$mirror" >"$sources/debootstrap.log"
		tar -C "$sources/debian" -cf "$sources/debian.tar.part" . && rm -rf "$sources/debian"
		mv "$sources/debian.tar.part" "$sources/debian.tar"
	fi
	say "stand-ins of the other images"
	bare rm --all >/dev/null 2>&1 || true # of a run that was cut short
	bare rmi --all --force >/dev/null 2>&1 || true
	cp /etc/ssl/certs/ca-certificates.crt "$sources/ca.crt"
	printf 'FROM scratch\nADD debian.tar /\nCMD ["bash"]\n' | image check/debian -f - "$sources"
	image check/python -f - "$sources" <<-'END'
		FROM localhost/check/debian
		RUN apt-get update -q && apt-get install -qy --no-install-recommends python3-pip
		COPY ca.crt /etc/ssl/certs/ca-certificates.crt
		ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
	END
	rm -rf "$sources/go" && cp -a "$(go env GOROOT)" "$sources/go"
	image check/golang -f - "$sources" <<-END
		FROM localhost/check/debian
		RUN apt-get update -q && apt-get install -qy --no-install-recommends gcc libc6-dev
		COPY ca.crt /etc/ssl/certs/ca-certificates.crt
		COPY go /usr/local/go
		ENV PATH=/usr/local/go/bin:/usr/bin:/bin:/usr/sbin:/sbin SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
			GOPROXY=$(go env GOPROXY) GOTOOLCHAIN=local
	END
	"$root/deploy/check/fetch-go-tools" nats compose >/dev/null
	cp "$cache/bin/nats-server" "$cache/bin/alertmanager" "$sources"
	image check/services -f - "$sources" <<-'END'
		FROM localhost/check/debian
		RUN mkdir -p /etc/postgresql-common && echo create_main_cluster = false >/etc/postgresql-common/createcluster.conf \
			&& apt-get update -q && apt-get install -qy --no-install-recommends postgresql procps prometheus wget
		COPY nats-server alertmanager /usr/local/bin/
		RUN install -d -o nobody -g nogroup /prometheus /alertmanager && ln -s /usr/lib/postgresql/15/bin/* /usr/local/bin
	END
	save check/services
	echo "$made" >"$store/made"
}
