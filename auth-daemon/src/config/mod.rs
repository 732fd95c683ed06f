//! The daemon's configuration file: YAML, checked as a whole, so that one run shows every error.

mod access_log;
mod ca;
mod discovery;
mod federation;
mod remote_clusters;
mod workload_api;

use std::{
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;

pub use access_log::{AccessFields, AccessLog, Sample};
pub use ca::{CaServer, CaSource, Join, Proof};
pub use discovery::{Discovery, NodeTaint};
pub use federation::{BundleSource, Federation, ForeignDomain};
pub use remote_clusters::RemoteClusters;

use auth_support::config::{self as section, Section, absolute, duration, node_name};
pub use auth_support::{
    config::InvalidConfig,
    log::{Log, LogFormat},
};

use auth_mesh::{TrustDomain, policy};
pub use workload_api::{Accounts, WorkloadApi};

/// What a pod admits from callers without the tunnel (Istio's PeerAuthentication modes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Plaintext is refused, except from the pod itself and from this node's own probes.
    Strict,
    /// Plaintext is accepted, as without the daemon.
    Permissive,
}

/// How two pods of this node communicate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SameNode {
    /// The kernel alone, once the daemon has decided: the bytes never leave the node.
    Kernel,
    /// TLS, as between nodes.
    Tunnel,
}

/// Whether pods may send anything but TCP to the mesh. It is never encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NonTcp {
    /// As without the daemon.
    Allow,
    /// UDP to mesh addresses is refused, and so are SCTP and DCCP sockets.
    Deny,
}

/// Which metrics of connections the daemon has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metrics {
    /// Its own.
    Daemon,
    /// Also Istio's standard metrics for TCP.
    Istio,
}

/// What the daemon keeps of connections, for the commands that show them and the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Observe {
    /// Those that ended in the last minutes, and which workloads call each other.
    #[default]
    Connections,
    /// Nothing.
    Nothing,
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This node's name, as pods' `spec.nodeName` has it. Defaults to `$NODE_NAME`, then the host name.
    pub node_name: String,
    /// The mesh's trust domain, with its aliases. Defaults to `cluster.local`, without aliases.
    pub trust_domain: TrustDomain,
    /// The foreign trust domains whose workloads are trusted under their own names. Defaults to none.
    pub federation: Federation,
    /// Defaults to STRICT.
    pub mode: Mode,
    /// Location of mesh-wide policies, and the defaults where no policy applies.
    pub policy: policy::Settings,
    /// Source of pods and services.
    pub discovery: Discovery,
    /// Source of certificates.
    pub ca: CaSource,
    /// Lifetime of requested certificates. Defaults to 24 hours, between 10 seconds and 24 hours.
    pub certificate_lifetime: Duration,
    /// Networks that contain pods, in addition to those that discovery finds. Connections to an address in them that no
    /// object claims are refused; callers of a PERMISSIVE pod from these networks may open a tunnel.
    pub pod_networks: Vec<IpNet>,
    /// Networks that contain virtual addresses of services, in addition to those that discovery finds. Connections to an
    /// address in them that no object claims are refused.
    pub service_networks: Vec<IpNet>,
    /// Defaults to the kernel.
    pub same_node: SameNode,
    /// Defaults to allow.
    pub non_tcp: NonTcp,
    /// Defaults to the daemon's own.
    pub metrics: Metrics,
    /// Defaults to connections.
    pub observe: Observe,
    /// How long SIGTERM waits for connections to end. Defaults to 5 seconds.
    pub drain: Duration,
    /// The container runtime's NRI socket. Without it, the runtime starts pods without waiting for the daemon.
    pub nri: Option<PathBuf>,
    /// Which apps get a certificate of their own by the SPIFFE Workload API. Defaults to none.
    pub workload_api: WorkloadApi,
    /// What is logged, and how.
    pub log: Log,
    /// How connections are logged.
    pub access_log: AccessLog,
    /// Where the programs attach. Defaults to the cgroup v2 mount.
    pub cgroup: Option<PathBuf>,
    /// Where links and maps are pinned. Defaults to `/sys/fs/bpf/auth-daemon`.
    pub pins: PathBuf,
}

/// Default folder for pins.
pub const DEFAULT_PINS: &str = "/sys/fs/bpf/auth-daemon";
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
const MIN_LIFETIME: Duration = Duration::from_secs(10);
const MAX_DRAIN: Duration = Duration::from_secs(60 * 60);

impl Config {
    /// Reads and checks `file`.
    pub fn load(file: &Path) -> Result<Self, InvalidConfig> {
        section::load(file, Self::parse)
    }

    /// Checks `text`; every error names its field.
    pub fn parse(text: &str) -> Result<Self, Vec<String>> {
        let mut errors = Vec::new();
        let mut root = Section::of_yaml(text, &mut errors)?;
        let node_name = root
            .parsed("nodeName", &mut errors, node_name)
            .or_else(default_node_name);
        let trust_domain = root.parsed("trustDomain", &mut errors, TrustDomain::from_str);
        let aliases = root.list("trustDomainAliases", &mut errors, TrustDomain::from_str);
        let trust_domain: TrustDomain = trust_domain.unwrap_or_default();
        let trust_domain = trust_domain.with_aliases(aliases.unwrap_or_default());
        let federation = Federation::read(&mut root, &trust_domain, &mut errors);
        let mode = root.parsed("mode", &mut errors, |s| match s {
            "STRICT" => Ok(Mode::Strict),
            "PERMISSIVE" => Ok(Mode::Permissive),
            _ => Err("is neither STRICT nor PERMISSIVE"),
        });
        let pod_networks = root.list("podNetworks", &mut errors, IpNet::from_str);
        let service_networks = root.list("serviceNetworks", &mut errors, IpNet::from_str);
        let same_node = root.parsed("sameNode", &mut errors, |s| match s {
            "kernel" => Ok(SameNode::Kernel),
            "tunnel" => Ok(SameNode::Tunnel),
            _ => Err("is neither kernel nor tunnel"),
        });
        let non_tcp = root.parsed("nonTcp", &mut errors, |s| match s {
            "allow" => Ok(NonTcp::Allow),
            "deny" => Ok(NonTcp::Deny),
            _ => Err("is neither allow nor deny"),
        });
        let metrics = root.parsed("metrics", &mut errors, |s| match s {
            "daemon" => Ok(Metrics::Daemon),
            "istio" => Ok(Metrics::Istio),
            _ => Err("is neither daemon nor istio"),
        });
        let observe = root.parsed("observe", &mut errors, |s| match s {
            "connections" => Ok(Observe::Connections),
            "nothing" => Ok(Observe::Nothing),
            _ => Err("is neither connections nor nothing"),
        });
        let mut policies = root.section("policy", &mut errors);
        let root_namespace = policies.parsed("rootNamespace", &mut errors, kubernetes_namespace);
        let drain = root.parsed("drain", &mut errors, |s| {
            duration(s, Duration::ZERO, MAX_DRAIN)
        });
        let nri = root.parsed("nri", &mut errors, absolute);
        let mut sources = root.section("discovery", &mut errors);
        let discovery = discovery::read(
            &mut sources,
            std::env::var("POD_NAMESPACE").ok(),
            &mut errors,
        );
        let mut ca = root.section("ca", &mut errors);
        let ca_source = ca::read(&mut ca, node_name.as_deref(), &trust_domain, &mut errors);
        let certificate_lifetime = ca.parsed("certificateLifetime", &mut errors, |s| {
            duration(s, MIN_LIFETIME, MAX_LIFETIME)
        });
        let workload_api = WorkloadApi::read(&mut root, &mut errors);
        let log = Log::read(&mut root, &mut errors);
        let access_log = AccessLog::read(&mut root, &mut errors);
        let mut kernel = root.section("kernel", &mut errors);
        let cgroup = kernel.parsed("cgroup", &mut errors, absolute);
        let pins = kernel.parsed("pins", &mut errors, absolute);
        for section in [sources, ca, policies, kernel, root] {
            section.refuse_the_rest(&mut errors);
        }
        if node_name.is_none() {
            errors.push(
                "nodeName: is missing, and neither $NODE_NAME nor the host name says it".into(),
            );
        }
        let is_on_demand = discovery.as_ref().is_some_and(Discovery::is_on_demand);
        if is_on_demand && non_tcp == Some(NonTcp::Deny) {
            let why = "nonTcp: deny needs to know what is outside the mesh";
            errors.push(format!("{why}: discovery.istiod.subscribe must be all"));
        }
        if metrics == Some(Metrics::Istio) && observe == Some(Observe::Nothing) {
            errors
                .push("metrics: istio counts what is observed: observe must be connections".into());
        }
        let (Some(node_name), Some(discovery), Some(ca), []) =
            (node_name, discovery, ca_source, errors.as_slice())
        else {
            return Err(errors);
        };
        Ok(Self {
            node_name,
            trust_domain: trust_domain.clone(),
            mode: mode.unwrap_or(Mode::Strict),
            policy: policy::Settings {
                root_namespace: root_namespace.unwrap_or_else(|| "istio-system".into()),
                mode: match mode {
                    None | Some(Mode::Strict) => policy::api::Mode::Strict,
                    Some(Mode::Permissive) => policy::api::Mode::Permissive,
                },
                trust_domain,
                foreign_trust_domains: {
                    let domains = federation.domains().iter();
                    domains.map(|domain| domain.trust_domain.clone()).collect()
                },
            },
            federation,
            discovery,
            ca,
            certificate_lifetime: certificate_lifetime.unwrap_or(MAX_LIFETIME),
            pod_networks: pod_networks.unwrap_or_default(),
            service_networks: service_networks.unwrap_or_default(),
            same_node: same_node.unwrap_or(SameNode::Kernel),
            non_tcp: non_tcp.unwrap_or(NonTcp::Allow),
            metrics: metrics.unwrap_or(Metrics::Daemon),
            observe: observe.unwrap_or_default(),
            drain: drain.unwrap_or(Duration::from_secs(5)),
            nri,
            workload_api,
            log,
            access_log,
            cgroup,
            pins: pins.unwrap_or_else(|| DEFAULT_PINS.into()),
        })
    }

    /// The ID of the daemon's cluster in Istio.
    pub fn cluster_id(&self) -> &str {
        match (&self.discovery, &self.ca) {
            (Discovery::Istiod { server: s, .. }, _) | (_, CaSource::Server(s)) => &s.cluster_id,
            _ => ca::DEFAULT_CLUSTER,
        }
    }
}

/// A namespace, as Kubernetes names one.
fn kubernetes_namespace(name: &str) -> Result<String, &'static str> {
    let named = TrustDomain::default().identity(name, "x");
    named
        .map(|_| name.to_owned())
        .map_err(|_| "is not the name of a namespace")
}

fn default_node_name() -> Option<String> {
    let environment = std::env::var("NODE_NAME").ok();
    environment
        .or_else(|| nix::unistd::gethostname().ok()?.into_string().ok())
        .and_then(|name| node_name(&name).ok())
}

#[cfg(test)]
mod tests {
    use auth_mesh::{Membership, MeshDefault};

    use super::*;

    const SMALL: &str = "nodeName: a\ndiscovery: {files: /m}\nca: {directory: /ca}\n";

    #[test]
    fn defaults() {
        let config = Config::parse(SMALL).unwrap();
        assert_eq!(config.trust_domain.as_str(), "cluster.local");
        assert_eq!(config.mode, Mode::Strict);
        assert_eq!(config.certificate_lifetime, Duration::from_secs(86400));
        assert_eq!(config.drain, Duration::from_secs(5));
        assert_eq!(config.pins, Path::new(DEFAULT_PINS));
        assert_eq!(config.same_node, SameNode::Kernel);
        assert_eq!(config.access_log, AccessLog::default());
        assert_eq!(config.observe, Observe::Connections);
    }

    #[test]
    fn istios_metrics_count_what_is_observed() {
        let with = |fields: &str| Config::parse(&format!("{SMALL}{fields}"));
        let config = with("observe: nothing\n").unwrap();
        assert_eq!(config.observe, Observe::Nothing);
        let errors = with("observe: nothing\nmetrics: istio\n").unwrap_err();
        assert!(
            errors[0].contains("observe must be connections"),
            "{errors:?}"
        );
    }

    #[test]
    fn reads_every_field() {
        let config = Config::parse(
            "nodeName: node-a\n\
             trustDomain: example.org\n\
             trustDomainAliases: [old.example.org, older.example.org]\n\
             mode: PERMISSIVE\n\
             discovery:\n  files: /etc/manifests\n\
             ca:\n  directory: /var/ca\n  certificateLifetime: 20s\n\
             podNetworks: [10.0.0.0/8, 'fd00::/8']\n\
             serviceNetworks: [172.20.0.0/16]\n\
             sameNode: tunnel\n\
             nonTcp: deny\n\
             metrics: istio\n\
             accessLog: {fields: opentelemetry, sample: 2.5%}\n\
             drain: 0s\n\
             workloadApi: {accounts: [shop/web]}\n\
             log: {format: json, level: debug}\n\
             kernel: {cgroup: /sys/fs/cgroup/x, pins: /sys/fs/bpf/x}\n",
        )
        .unwrap();
        assert_eq!(config.mode, Mode::Permissive);
        assert_eq!(config.trust_domain.as_str(), "example.org");
        assert!(config.policy.trust_domain.is_named("older.example.org"));
        assert_eq!(config.pod_networks.len(), 2);
        assert_eq!(config.service_networks, ["172.20.0.0/16".parse().unwrap()]);
        assert_eq!(config.certificate_lifetime, Duration::from_secs(20));
        assert_eq!(config.same_node, SameNode::Tunnel);
        assert_eq!(config.metrics, Metrics::Istio);
        assert_eq!(config.access_log.fields, AccessFields::OpenTelemetry);
        assert_eq!(config.access_log.sample, "2.5%".parse().unwrap());
        assert_eq!(config.drain, Duration::ZERO);
        assert_eq!(config.workload_api.accounts.len(), 1);
        assert_eq!(config.log.format, LogFormat::Json);
        assert_eq!(
            config.cgroup.as_deref(),
            Some(Path::new("/sys/fs/cgroup/x"))
        );
    }

    #[test]
    fn shows_all_faults_at_once() {
        let errors = Config::parse(
            "nodeName: ''\nsameNode: both\nnonTcp: never\nmetrics: all\nobserve: some\nmode: strict\nmood: good\npodNetworks: [10.0.0.0/33]\n\
             trustDomainAliases: [Old]\n\
             drain: 5\nworkloadApi: {accounts: [web]}\nlog: {format: xml, colour: red}\n\
             accessLog: {fields: ecs, sample: 0.1}\nca: here\n",
        )
        .unwrap_err();
        let text = errors.join("\n");
        for expected in [
            "nodeName: \"\": is not a node name",
            "mode: \"strict\": is neither STRICT nor PERMISSIVE",
            "sameNode: \"both\": is neither kernel nor tunnel",
            "nonTcp: \"never\": is neither allow nor deny",
            "metrics: \"all\": is neither daemon nor istio",
            "observe: \"some\": is neither connections nor nothing",
            "mood: there is no such field",
            "podNetworks[0]: \"10.0.0.0/33\"",
            "trustDomainAliases[0]: \"Old\"",
            "drain: 5 is not a string",
            "workloadApi.accounts[0]: \"web\": is neither namespace/account nor namespace/*",
            "discovery: has neither files",
            "ca: is not a mapping",
            "ca: has neither directory",
            "log.format: \"xml\": is neither text nor json",
            "log.colour: there is no such field",
            "accessLog.fields: \"ecs\": is neither daemon nor opentelemetry",
            "accessLog.sample: 0.1 is not a string",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in:\n{text}");
        }
    }

    #[test]
    fn pods_come_from_a_folder_or_from_the_cluster() {
        let parse = |text: &str, own: Option<&str>| {
            let mut errors = Vec::new();
            let mut section = Section::of_yaml(text, &mut errors).unwrap();
            let found = discovery::read(&mut section, own.map(str::to_owned), &mut errors);
            section.refuse_the_rest(&mut errors);
            if errors.is_empty() {
                Ok(found.unwrap())
            } else {
                Err(errors.join("\n"))
            }
        };
        let cluster = |membership, excluded: &[&str], node_taint| {
            Ok(Discovery::Kubernetes {
                defaults: MeshDefault {
                    membership,
                    excluded: excluded.iter().map(|name| (*name).to_owned()).collect(),
                },
                own_namespace: "auth-system".into(),
                node_taint,
                remote: None,
            })
        };
        let own = Some("auth-system");
        assert_eq!(parse("files: /m", None), Ok(Discovery::Files("/m".into())));
        assert_eq!(
            parse("kubernetes: {}", own),
            cluster(
                Membership::Enabled,
                &["auth-system", "kube-system"],
                NodeTaint::Ignore
            )
        );
        assert_eq!(
            parse(
                "kubernetes: {default: disabled, excludedNamespaces: [shop], nodeTaint: manage}",
                own
            ),
            cluster(
                Membership::Disabled,
                &["auth-system", "shop"],
                NodeTaint::Manage
            )
        );
        let istiod = "address: 'istiod.istio-system.svc:15012', rootFile: /r, tokenFile: /t";
        for (text, expected) in [
            ("", "istiod.istio-system.svc Kubernetes  false"),
            (
                "clusterId: c1, network: n1, subscribe: onDemand",
                "istiod.istio-system.svc c1 n1 true",
            ),
        ] {
            let found = parse(&format!("istiod: {{{istiod}, {text}}}"), own);
            let Ok(Discovery::Istiod {
                server,
                network,
                on_demand,
                ..
            }) = found
            else {
                panic!("{found:?}");
            };
            let (name, cluster) = (server.server_name, server.cluster_id);
            let found = format!("{name} {cluster} {network} {on_demand}");
            assert_eq!(found, expected);
        }
        for (wrong, own, error) in [
            (
                "istiod: {address: 'istiod:15012', rootFile: /r}",
                own,
                "istiod.tokenFile: is missing",
            ),
            (
                "istiod: {clusterId: 'a b'}",
                own,
                "istiod.clusterId: \"a b\": is not an ID",
            ),
            ("istiod: {}", None, "istiod: $POD_NAMESPACE"),
            (
                "istiod: {subscribe: some}",
                own,
                "istiod.subscribe: \"some\": is neither all nor onDemand",
            ),
            ("kubernetes: {}", None, "$POD_NAMESPACE is not set"),
            ("kubernetes: {}\nfiles: /m", own, "it is one or the other"),
            ("kubernetes: {default: yes}", own, "kubernetes.default: "),
            (
                "kubernetes: {nodeTaint: remove}",
                own,
                "is neither manage nor ignore",
            ),
            (
                "kubernetes: {excludedNamespaces: [A]}",
                own,
                "is not the name of a namespace",
            ),
            (
                "kubernetes: {mode: x}",
                own,
                "kubernetes.mode: there is no such field",
            ),
        ] {
            let errors = parse(wrong, own).unwrap_err();
            assert!(
                errors.contains(error),
                "{wrong}: {error:?} is not in:\n{errors}"
            );
        }
    }

    #[test]
    fn refuses_what_is_no_yaml_mapping() {
        assert!(Config::parse("[]").unwrap_err()[0].contains("not a mapping"));
        assert!(Config::parse("a: [").unwrap_err()[0].contains("is not YAML"));
    }
}
