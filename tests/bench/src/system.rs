//! The systems that are compared.

use std::fmt;

use clap::ValueEnum;

/// A way for pods to talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum System {
    /// No proxy, no TLS
    Direct,
    /// An Envoy sidecar in each pod
    Envoy,
    /// ztunnel on each node; needs ZTUNNEL, the path of its binary
    Ztunnel,
    /// auth-daemon on each node
    Ours,
    /// auth-daemon on each node, as peers that speak only HBONE
    Hbone,
    /// auth-daemon on each node, which observes nothing
    Unobserved,
}

impl System {
    /// Its name in tables and files.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Envoy => "envoy",
            Self::Ztunnel => "ztunnel",
            Self::Ours => "ours",
            Self::Hbone => "hbone",
            Self::Unobserved => "unobserved",
        }
    }

    /// Its name in the documentation.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Envoy => "Envoy, two sidecars",
            Self::Ztunnel => "ztunnel",
            Self::Ours => "auth-daemon",
            Self::Hbone => "auth-daemon, HBONE",
            Self::Unobserved => "auth-daemon, observe: nothing",
        }
    }

    /// What it is, for readers of the results.
    pub(super) fn description(self) -> &'static str {
        match self {
            Self::Direct => "no proxy, plaintext",
            Self::Envoy => {
                "an Envoy sidecar in each pod as Istio places them: tcp_proxy, TLS 1.3 both ways, --concurrency 2, \
                 redirected by nftables, no access log"
            }
            Self::Ztunnel => {
                "ztunnel on each node as Istio's ambient mode places it: sockets in the pods, HBONE, redirected by nftables, \
                 default settings, access log included; certificates from auth-daemon's CA"
            }
            Self::Ours => "auth-daemon on each node with its default settings, access log included",
            Self::Hbone => "the same, but by HBONE instead of auth-daemon's own framing",
            Self::Unobserved => "the same, but with observe: nothing",
        }
    }

    /// Whether proxies carry its connections.
    pub(super) fn has_proxies(self) -> bool {
        self != Self::Direct
    }
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The destination of the client's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// A pod of the other node.
    Across,
    /// A pod of the client's own node.
    OneNode,
    /// A host that is not in the mesh.
    Outside,
}

/// One of a connection's two proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The sidecar of the client's pod, or the daemon of its node.
    Client,
    /// The server's proxy, on the other node.
    Server,
}
