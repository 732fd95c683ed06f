//! A mesh of several nodes on one machine, for the scenario tests and the demo.
//!
//! Every node and every pod is a network namespace and a cgroup of its own. The programs that run in them, above all
//! the daemon, are the real ones. Traffic on the link between the nodes can be captured and read.
//!
//! ```text
//!                       wire: bridge br0, no addresses
//!        ┌───────────────────────┬───────────────────────┐
//!        n1                      n2                      outside
//!        │                       │                       │
//!  eth0 172.31.0.11        eth0 172.31.0.12        eth0 192.0.2.10
//!       fd31::11                fd31::12                2001:db8::10
//!  node-a                  node-b                  a host that is not in the mesh
//!  cni0 10.77.1.1/24       cni0 10.77.2.1/24
//!       fd77:1::1/64            fd77:2::1/64
//!        │                       │
//!  eth0 10.77.1.2          eth0 10.77.2.2
//!       fd77:1::2               fd77:2::2
//!  pod                     pod
//! ```
//!
//! With [`MeshBuilder::routed`], each pod has a link of its own to its node instead of one to the node's bridge.
//!
//! Pods and nodes are routed, without NAT, so the outside host sees pods' own addresses. `rp_filter` stays as the
//! kernel sets it in a new namespace (copied from the first one or 0, see `net.core.devconf_inherit_init_net`). MTU is
//! 1500. Service addresses need no links or routes: a pod's default route sends them to its node, which has no route
//! for them.
//!
//! ```no_run
//! use mesh_tests::{Mesh, PodSpec, ServiceSpec};
//!
//! let mesh = Mesh::builder()
//!     .node("node-a")
//!     .node("node-b")
//!     .pod(PodSpec::new("client").on("node-a").service_account("client"))
//!     .pod(PodSpec::new("web").on("node-b").service_account("web").label("app", "web").port("http", 8080))
//!     .service(ServiceSpec::new("web").selector("app", "web").address("10.96.0.10").port(80, 8080))
//!     .start()?;
//! let _daemons = mesh.start_daemons()?;
//! let nginx = mesh_tests::Nginx::start(mesh.pod("web").place(), 8080, "hello")?;
//! let recording = mesh.wire().capture()?;
//! mesh.pod("client").run("curl", ["-s", "http://10.96.0.10/"])?.ok()?;
//! assert!(!recording.stop()?.contains(b"hello"));
//! # drop(nginx);
//! # anyhow::Ok(())
//! ```
//!
//! Everything that a mesh creates carries its ID (the process ID and a counter): namespaces `/run/netns/am<id>-…`,
//! cgroups and pins `auth-mesh-<id>`, and a temporary folder. Dropping the [`Mesh`] removes them, also during a panic.
//! What a killed process left behind is removed by the next mesh that starts. A mesh requires root.

mod app;
mod architecture;
mod builder;
mod ca;
mod capture;
mod cgroup;
pub mod chart;
pub mod cluster;
mod daemon;
mod daemon_options;
mod eventually;
mod firewall;
mod http;
mod id;
mod ip;
mod kubernetes;
mod leftovers;
mod libraries;
mod locate;
mod manifests;
mod mesh;
mod mounts;
mod netns;
mod node;
mod oidc;
mod packet;
pub mod peers;
mod place;
mod plumbing;
mod pod;
mod process;
mod reassembly;
mod recording;
mod servers;
mod snapshot;
mod sockets;
mod spec;
mod status;
mod tls_records;
mod tree;
pub mod two_domains;
pub mod vm;
mod wire;

pub use anyhow::{Context, Error, Result};

pub use app::App;
pub use architecture::Architecture;
pub use builder::MeshBuilder;
pub use ca::{Ca, CaOptions};
pub use capture::Capture;
pub use cluster::{
    AUTH_DAEMON_IMAGE, AuthDaemonImage, Cluster, ClusterNode, ClusterOptions, PodNetwork,
    ProxyMode, TOOLS, auth_daemon_image,
};
pub use daemon::Daemon;
pub use daemon_options::DaemonOptions;
pub use eventually::{TIMEOUT, eventually, eventually_ok, slowdown};
pub use firewall::Firewall;
pub use http::{Response, http_get};
pub use id::MeshId;
pub use kubernetes::{
    GoModule, IstioCa, IstioSvid, Istiod, IstiodOptions, Kubernetes, TokenOptions, programs_folder,
};
pub use leftovers::{remove_dead, remove_own, traces};
pub use libraries::shared_libraries;
pub use locate::{auth_daemon, pod_app};
pub use manifests::Manifests;
pub use mesh::Mesh;
pub use netns::Netns;
pub use node::Node;
pub use oidc::OidcIssuer;
pub use packet::{Packet, Transport};
pub use peers::{Envoy, Package, Spire, SpireOptions, Ztunnel};
pub use place::Place;
pub use pod::Pod;
pub use process::{Finished, Process};
pub use reassembly::Stream;
pub use recording::Recording;
pub use servers::{InProcess, Iperf3, Nginx, NginxRequest, OpensslServer};
pub use snapshot::Snapshot;
pub use sockets::{Endpoint, SocketCount, TcpState, sockets};
pub use spec::{PodSpec, ServiceSpec};
pub use status::{
    CertificateStatus, ConnectionStatus, KernelStatus, PodStatus, PoolStatus, Status,
};
pub use tls_records::{NotTls, TlsRecord, tls_records};
pub use tree::FileTree;
pub use wire::Wire;
