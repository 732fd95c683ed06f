//! The setup of most scenarios: a client on one node, a server on another, and a service in front of it.

use mesh_tests::{Daemon, DaemonOptions, Mesh, MeshBuilder, Pod, PodSpec, Result, ServiceSpec};

/// Fields are dropped in this order: the daemons, then the mesh.
pub(crate) struct Pair {
    /// The client's daemon.
    pub(crate) near: Daemon,
    /// The server's daemon.
    pub(crate) far: Daemon,
    pub(crate) client: Pod,
    pub(crate) web: Pod,
    pub(crate) mesh: Mesh,
}

impl Pair {
    /// Starts the pair with daemons on both nodes.
    pub(crate) fn start() -> Result<Self> {
        Self::start_with(&DaemonOptions::default(), |builder| builder)
    }

    /// Starts the pair with options of the daemons and additions to the mesh.
    pub(crate) fn start_with(
        options: &DaemonOptions,
        more: impl FnOnce(MeshBuilder) -> MeshBuilder,
    ) -> Result<Self> {
        Self::on(more(builder()).start()?, options)
    }

    /// Starts daemons with options on both nodes of the mesh, which [`builder`] describes.
    pub(crate) fn on(mesh: Mesh, options: &DaemonOptions) -> Result<Self> {
        let mut daemons = mesh.start_daemons_with(options)?.into_iter();
        let (Some(near), Some(far)) = (daemons.next(), daemons.next()) else {
            unreachable!("each of two nodes has a daemon")
        };
        Ok(Self {
            near,
            far,
            client: mesh.pod("client"),
            web: mesh.pod("web"),
            mesh,
        })
    }
}

/// The mesh without daemons: pods `client` on node a and `web` on node b, and a service in front of `web`.
pub(crate) fn builder() -> MeshBuilder {
    Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(
            PodSpec::new("web")
                .on("b")
                .service_account("web")
                .label("app", "web")
                .port("http", 8081),
        )
        .service(
            ServiceSpec::new("web")
                .selector("app", "web")
                .address("10.96.0.7")
                .address("fd96::7")
                .port(80, 8080)
                .named_port(81, "http"),
        )
}
