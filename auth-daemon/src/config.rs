//! The daemon's configuration file: YAML, checked as a whole, so that one run shows every fault.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use serde_json::{Map, Value};

use crate::mesh::TrustDomain;

/// What a pod admits from callers without the tunnel (Istio's PeerAuthentication modes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Refused, but for the pod itself and this node's own probes.
    Strict,
    /// As the kernel would have it.
    Permissive,
}

/// What two pods of this node talk through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SameNode {
    /// Their kernel alone, once the daemon has decided: there is no wire between them.
    Kernel,
    /// TLS, as between nodes.
    Tunnel,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This node's name, as pods' `spec.nodeName` has it. Defaults to `$NODE_NAME`, then the host name.
    pub node_name: String,
    /// Defaults to `cluster.local`.
    pub trust_domain: TrustDomain,
    /// Defaults to STRICT.
    pub mode: Mode,
    /// Folder of Kubernetes manifests to watch.
    pub manifests: PathBuf,
    /// Folder with the trust domain's root key and certificate.
    pub ca_directory: PathBuf,
    /// Life of the certificates made here. Defaults to 24 hours, between 10 seconds and 24 hours.
    pub certificate_lifetime: Duration,
    /// Networks that pods live in: in PERMISSIVE, callers from here may be about to speak the tunnel.
    pub pod_networks: Vec<IpNet>,
    /// Defaults to the kernel.
    pub same_node: SameNode,
    /// How long SIGTERM waits for connections to end. Defaults to 5 seconds.
    pub drain: Duration,
    /// Defaults to text.
    pub log_format: LogFormat,
    /// A tracing filter such as `info` or `auth_daemon=debug`. Defaults to `info`.
    pub log_level: String,
    /// Where the programs attach. Defaults to the cgroup v2 mount.
    pub cgroup: Option<PathBuf>,
    /// Where links and maps are pinned. Defaults to `/sys/fs/bpf/auth-daemon`.
    pub pins: PathBuf,
}

/// Everything that is wrong with a configuration file.
#[derive(Debug)]
pub struct InvalidConfig {
    file: PathBuf,
    faults: Vec<String>,
}

impl fmt::Display for InvalidConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cannot be used:", self.file.display())?;
        for fault in &self.faults {
            write!(f, "\n  {fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for InvalidConfig {}

/// Where pins go unless told otherwise.
pub const DEFAULT_PINS: &str = "/sys/fs/bpf/auth-daemon";
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
const MIN_LIFETIME: Duration = Duration::from_secs(10);
const MAX_DRAIN: Duration = Duration::from_secs(60 * 60);

impl Config {
    /// Reads and checks `file`.
    pub fn load(file: &Path) -> Result<Self, InvalidConfig> {
        let invalid = |faults| InvalidConfig {
            file: file.to_owned(),
            faults,
        };
        let text = fs::read_to_string(file)
            .map_err(|error| invalid(vec![format!("cannot be read: {error}")]))?;
        Self::parse(&text).map_err(invalid)
    }

    /// Checks `text`; every fault names its field.
    pub fn parse(text: &str) -> Result<Self, Vec<String>> {
        let root: Value =
            serde_saphyr::from_str(text).map_err(|error| vec![format!("is not YAML: {error}")])?;
        let mut faults = Vec::new();
        let mut root = Section::new("", root, &mut faults);
        let node_name = root
            .parsed("nodeName", &mut faults, node_name)
            .or_else(default_node_name);
        let trust_domain = root.parsed("trustDomain", &mut faults, TrustDomain::from_str);
        let mode = root.parsed("mode", &mut faults, |s| match s {
            "STRICT" => Ok(Mode::Strict),
            "PERMISSIVE" => Ok(Mode::Permissive),
            _ => Err("is neither STRICT nor PERMISSIVE"),
        });
        let pod_networks = root.list("podNetworks", &mut faults, IpNet::from_str);
        let same_node = root.parsed("sameNode", &mut faults, |s| match s {
            "kernel" => Ok(SameNode::Kernel),
            "tunnel" => Ok(SameNode::Tunnel),
            _ => Err("is neither kernel nor tunnel"),
        });
        let drain = root.parsed("drain", &mut faults, |s| {
            duration(s, Duration::ZERO, MAX_DRAIN)
        });
        let mut discovery = root.section("discovery", &mut faults);
        let manifests = discovery.required("files", &mut faults, absolute);
        let mut ca = root.section("ca", &mut faults);
        let ca_directory = ca.required("directory", &mut faults, absolute);
        let certificate_lifetime = ca.parsed("certificateLifetime", &mut faults, |s| {
            duration(s, MIN_LIFETIME, MAX_LIFETIME)
        });
        let mut log = root.section("log", &mut faults);
        let log_format = log.parsed("format", &mut faults, |s| match s {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err("is neither text nor json"),
        });
        let log_level = log.parsed("level", &mut faults, |s| {
            tracing_subscriber::EnvFilter::try_new(s).map(|_| s.to_owned())
        });
        let mut kernel = root.section("kernel", &mut faults);
        let cgroup = kernel.parsed("cgroup", &mut faults, absolute);
        let pins = kernel.parsed("pins", &mut faults, absolute);
        for section in [discovery, ca, log, kernel, root] {
            section.refuse_the_rest(&mut faults);
        }
        if node_name.is_none() {
            faults.push(
                "nodeName: is missing, and neither $NODE_NAME nor the host name says it".into(),
            );
        }
        let (Some(node_name), Some(manifests), Some(ca_directory), []) =
            (node_name, manifests, ca_directory, faults.as_slice())
        else {
            return Err(faults);
        };
        Ok(Self {
            node_name,
            trust_domain: trust_domain.unwrap_or_else(|| {
                // A literal that the parser takes: see the tests.
                "cluster.local".parse().expect("well-formed")
            }),
            mode: mode.unwrap_or(Mode::Strict),
            manifests,
            ca_directory,
            certificate_lifetime: certificate_lifetime.unwrap_or(MAX_LIFETIME),
            pod_networks: pod_networks.unwrap_or_default(),
            same_node: same_node.unwrap_or(SameNode::Kernel),
            drain: drain.unwrap_or(Duration::from_secs(5)),
            log_format: log_format.unwrap_or(LogFormat::Text),
            log_level: log_level.unwrap_or_else(|| "info".to_owned()),
            cgroup,
            pins: pins.unwrap_or_else(|| DEFAULT_PINS.into()),
        })
    }
}

/// A mapping of the file, emptied as its fields are taken, so that what is left is what nobody knows.
struct Section {
    path: String,
    fields: Map<String, Value>,
}

impl Section {
    fn new(path: &str, value: Value, faults: &mut Vec<String>) -> Self {
        let fields = match value {
            Value::Object(fields) => fields,
            Value::Null => Map::new(),
            _ => {
                let name = if path.is_empty() { "the file" } else { path };
                faults.push(format!("{name}: is not a mapping of fields"));
                Map::new()
            }
        };
        Self {
            path: path.to_owned(),
            fields,
        }
    }

    fn field(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    fn section(&mut self, name: &str, faults: &mut Vec<String>) -> Self {
        let value = self.fields.remove(name).unwrap_or(Value::Null);
        Self::new(&self.field(name), value, faults)
    }

    fn parsed<T, E: fmt::Display>(
        &mut self,
        name: &str,
        faults: &mut Vec<String>,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let field = self.field(name);
        match self.fields.remove(name)? {
            Value::String(text) => parse(&text)
                .map_err(|error| faults.push(format!("{field}: {text:?}: {error}")))
                .ok(),
            other => {
                faults.push(format!("{field}: {other} is not a string"));
                None
            }
        }
    }

    fn required<T, E: fmt::Display>(
        &mut self,
        name: &str,
        faults: &mut Vec<String>,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        if !self.fields.contains_key(name) {
            faults.push(format!("{}: is missing", self.field(name)));
        }
        self.parsed(name, faults, parse)
    }

    fn list<T, E: fmt::Display>(
        &mut self,
        name: &str,
        faults: &mut Vec<String>,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<Vec<T>> {
        let field = self.field(name);
        let Value::Array(items) = self.fields.remove(name)? else {
            faults.push(format!("{field}: is not a list"));
            return None;
        };
        let mut parsed = Vec::new();
        for (index, item) in items.into_iter().enumerate() {
            match item.as_str().map(&parse) {
                Some(Ok(value)) => parsed.push(value),
                Some(Err(error)) => faults.push(format!("{field}[{index}]: {item}: {error}")),
                None => faults.push(format!("{field}[{index}]: {item} is not a string")),
            }
        }
        Some(parsed)
    }

    fn refuse_the_rest(self, faults: &mut Vec<String>) {
        for name in self.fields.keys() {
            faults.push(format!("{}: there is no such field", self.field(name)));
        }
    }
}

fn node_name(name: &str) -> Result<String, &'static str> {
    let valid = !name.is_empty()
        && name.len() <= 253
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    if valid {
        Ok(name.to_owned())
    } else {
        Err("is not a node name")
    }
}

fn default_node_name() -> Option<String> {
    let environment = std::env::var("NODE_NAME").ok();
    environment
        .or_else(|| nix::unistd::gethostname().ok()?.into_string().ok())
        .and_then(|name| node_name(&name).ok())
}

fn absolute(path: &str) -> Result<PathBuf, &'static str> {
    let path = PathBuf::from(path);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err("is not an absolute path")
    }
}

/// A whole number with the unit `ms`, `s`, `m` or `h`.
fn duration(text: &str, min: Duration, max: Duration) -> Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        _ => return Err("is not a duration such as 500ms, 5s, 10m or 24h".into()),
    };
    let duration = number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(milliseconds))
        .map(Duration::from_millis)
        .ok_or("is not a duration such as 500ms, 5s, 10m or 24h")?;
    if (min..=max).contains(&duration) {
        Ok(duration)
    } else {
        Err(format!("is not between {min:?} and {max:?}"))
    }
}

#[cfg(test)]
mod tests {
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
    }

    #[test]
    fn reads_every_field() {
        let config = Config::parse(
            "nodeName: node-a\n\
             trustDomain: example.org\n\
             mode: PERMISSIVE\n\
             discovery:\n  files: /etc/manifests\n\
             ca:\n  directory: /var/ca\n  certificateLifetime: 20s\n\
             podNetworks: [10.0.0.0/8, 'fd00::/8']\n\
             sameNode: tunnel\n\
             drain: 0s\n\
             log: {format: json, level: debug}\n\
             kernel: {cgroup: /sys/fs/cgroup/x, pins: /sys/fs/bpf/x}\n",
        )
        .unwrap();
        assert_eq!(config.mode, Mode::Permissive);
        assert_eq!(config.pod_networks.len(), 2);
        assert_eq!(config.certificate_lifetime, Duration::from_secs(20));
        assert_eq!(config.same_node, SameNode::Tunnel);
        assert_eq!(config.drain, Duration::ZERO);
        assert_eq!(config.log_format, LogFormat::Json);
        assert_eq!(
            config.cgroup.as_deref(),
            Some(Path::new("/sys/fs/cgroup/x"))
        );
    }

    #[test]
    fn shows_all_faults_at_once() {
        let faults = Config::parse(
            "nodeName: ''\nsameNode: both\nmode: strict\nmood: good\npodNetworks: [10.0.0.0/33]\n\
             drain: 5\nlog: {format: xml, colour: red}\nca: here\n",
        )
        .unwrap_err();
        let text = faults.join("\n");
        for expected in [
            "nodeName: \"\": is not a node name",
            "mode: \"strict\": is neither STRICT nor PERMISSIVE",
            "sameNode: \"both\": is neither kernel nor tunnel",
            "mood: there is no such field",
            "podNetworks[0]: \"10.0.0.0/33\"",
            "drain: 5 is not a string",
            "discovery.files: is missing",
            "ca: is not a mapping",
            "ca.directory: is missing",
            "log.format: \"xml\": is neither text nor json",
            "log.colour: there is no such field",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in:\n{text}");
        }
    }

    #[test]
    fn refuses_what_is_no_yaml_mapping() {
        assert!(Config::parse("[]").unwrap_err()[0].contains("not a mapping"));
        assert!(Config::parse("a: [").unwrap_err()[0].contains("is not YAML"));
    }

    #[test]
    fn durations() {
        let any = |text| duration(text, Duration::ZERO, Duration::MAX);
        assert_eq!(any("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(any("2h"), Ok(Duration::from_secs(7200)));
        for bad in ["", "s", "5", "-5s", "5 s", "1d", "99999999999999999999s"] {
            assert!(any(bad).is_err(), "{bad}");
        }
    }
}
