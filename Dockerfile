# syntax=docker/dockerfile:1
# The daemon's image, as `cargo xtask image` writes it without Docker: the program and the C library, no shell. That of
# xtask is reproducible, and describes its content in a file.
#   docker build --tag auth-daemon:0.1.0 .

FROM rust:1-bookworm AS build
WORKDIR /src
COPY . .
# The eBPF programs first: the daemon embeds them. Their toolchain comes with apt. `cargo auditable` lists the crates in the
# program, for scanners of images.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo xtask build-ebpf \
    && cargo install --locked cargo-auditable@0.7.7 \
    && cargo auditable build --profile dist --locked --package auth-daemon --bin auth-daemon \
    && strip --strip-debug -o /auth-daemon target/dist/auth-daemon

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /auth-daemon /usr/bin/auth-daemon
# As user 65532, which is enough for the CA. The DaemonSet asks for root and for the capabilities that it needs.
ENTRYPOINT ["/usr/bin/auth-daemon"]
