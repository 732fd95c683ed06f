//! `auth-daemon policy`: who may call whom, and why, from a folder of manifests. For a person at a terminal and for a
//! pipeline that must not let a change through.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, anyhow, bail, ensure};
use clap::{Subcommand, ValueEnum};
use serde_json::Value;

use crate::{
    discovery::manifest,
    mesh::{Identity, ObjectName, Service, TrustDomain, Workload},
    policy::{
        Connection, Policies, Settings,
        api::{Condition, Mode, Object},
        explain,
    },
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say whether one may call another, by which rule, and why the other policies do not match. Exit code 0: allowed,
    /// 1: denied, 2: it cannot be told.
    Check(CheckArguments),
    /// List the policies, what each selects and what is wrong with it. Exit code 2 if one cannot be read.
    List(Manifests),
}

#[derive(Debug, clap::Args)]
struct CheckArguments {
    /// Who calls: a SPIFFE ID, or a pod as NAMESPACE/NAME.
    #[arg(long)]
    from: String,
    /// Who is called: a pod or service as NAMESPACE/NAME[:PORT]; where both have the name, pod/NAMESPACE/NAME or
    /// service/NAMESPACE/NAME. A service is each of its pods.
    #[arg(long)]
    to: String,
    /// Where the call comes from, in place of the pod's own address.
    #[arg(long)]
    source_ip: Option<IpAddr>,
    #[command(flatten)]
    manifests: Manifests,
}

#[derive(Debug, clap::Args)]
struct Manifests {
    /// Folder of manifests: pods with their addresses, services, policies.
    #[arg(long)]
    files: PathBuf,
    /// The trust domain of the pods' identities.
    #[arg(long, default_value = "cluster.local")]
    trust_domain: String,
    /// Policies in this namespace are for all namespaces.
    #[arg(long, default_value = "istio-system")]
    root_namespace: String,
    /// What a pod takes that no PeerAuthentication is for.
    #[arg(long, value_enum, default_value_t = DefaultMode::Strict, ignore_case = true)]
    mode: DefaultMode,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DefaultMode {
    Strict,
    Permissive,
}

/// It cannot be told: neither allowed nor denied.
const UNKNOWN: u8 = 2;
const DENIED: u8 = 1;

pub(super) fn policy(arguments: &Arguments) -> ExitCode {
    let done = match &arguments.command {
        Command::Check(arguments) => check(arguments).map(|(text, allowed)| {
            print!("{text}");
            if allowed { 0 } else { DENIED }
        }),
        Command::List(manifests) => list(manifests).map(|(text, readable)| {
            print!("{text}");
            if readable { 0 } else { UNKNOWN }
        }),
    };
    match done {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("auth-daemon: {error:#}");
            UNKNOWN.into()
        }
    }
}

/// What a folder holds.
struct Known {
    folder: PathBuf,
    pods: Vec<Workload>,
    services: Vec<Service>,
    policies: Policies,
}

/// One who calls.
struct Client {
    name: String,
    identity: Identity,
    /// Where the pod can call from; empty where no pod is known.
    addresses: Vec<IpAddr>,
}

/// The explanation, and whether every call is allowed.
fn check(arguments: &CheckArguments) -> anyhow::Result<(String, bool)> {
    let known = arguments.manifests.read()?;
    for warning in known.policies.warnings() {
        eprintln!("warning: {warning}");
    }
    let mut clients = known.clients(&arguments.from)?;
    if let Some(source) = arguments.source_ip {
        for client in &mut clients {
            client.addresses = vec![source.to_canonical()];
        }
    }
    let servers = known.servers(&arguments.to)?;
    // Many pods mostly fare alike: what is said of each is said once.
    let mut said: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut all_allowed = true;
    for client in &clients {
        for (server, port) in &servers {
            let (address, source) = known.route(client, server)?;
            let connection = Connection {
                client: Some(&client.identity),
                source,
                destination: SocketAddr::new(address, *port),
            };
            let explanation = explain(
                &known.policies,
                &server.name.namespace,
                &server.labels,
                &connection,
            );
            all_allowed &= explanation.verdict.allowed();
            let from = match source.is_unspecified() {
                true => client.name.clone(),
                false => format!("{} at {source}", client.name),
            };
            let call = format!("{from} to {} at {}", server.name, connection.destination);
            said.entry(explanation.to_string()).or_default().push(call);
        }
    }
    let mut text = String::new();
    for (explanation, calls) in said {
        if !text.is_empty() {
            text.push('\n');
        }
        let more = match calls.len() - 1 {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        text.push_str(&format!("{}{more}:\n{explanation}", calls[0]));
    }
    Ok((text, all_allowed))
}

impl Known {
    fn clients(&self, from: &str) -> anyhow::Result<Vec<Client>> {
        let client = |pod: &Workload| Client {
            name: format!("{} ({})", pod.name, pod.identity),
            identity: pod.identity.clone(),
            addresses: pod.addresses.clone(),
        };
        if !from.starts_with("spiffe://") {
            let name = object_name(from).with_context(|| format!("--from {from:?}"))?;
            let pod = self
                .pod(&name)
                .with_context(|| self.missing("pod", &name))?;
            return Ok(vec![client(pod)]);
        }
        let identity: Identity = from.parse().with_context(|| format!("--from {from:?}"))?;
        let mut clients: Vec<_> = self
            .pods
            .iter()
            .filter(|pod| pod.identity == identity)
            .map(client)
            .collect();
        if clients.is_empty() {
            clients.push(Client {
                name: identity.to_string(),
                identity,
                addresses: Vec::new(),
            });
        }
        Ok(clients)
    }

    /// The pods that are called, each with the app's port.
    fn servers(&self, to: &str) -> anyhow::Result<Vec<(&Workload, u16)>> {
        let bad = || format!("--to {to:?}");
        let (target, port) = match to.rsplit_once(':') {
            Some((target, port)) => {
                let port = port.parse().map_err(|_| anyhow!("{port:?} is not a port"));
                (target, Some(port.with_context(bad)?))
            }
            None => (to, None),
        };
        let (kind, name) = match target.split_once('/') {
            Some((kind @ ("pod" | "service"), name)) if name.contains('/') => (Some(kind), name),
            _ => (None, target),
        };
        let name = object_name(name).with_context(bad)?;
        let pod = self.pod(&name).filter(|_| kind != Some("service"));
        let service = self.services.iter().find(|service| service.name == name);
        match (pod, service.filter(|_| kind != Some("pod"))) {
            (Some(_), Some(_)) => {
                bail!("{name} is a pod and a service: ask for pod/{name} or service/{name}")
            }
            (Some(pod), None) => {
                let named: Vec<u16> = pod.named_ports.values().copied().collect();
                let port = one_port(port, &named).with_context(bad)?;
                Ok(vec![(pod, port)])
            }
            (None, Some(service)) => self.endpoints(service, port).with_context(bad),
            (None, None) => bail!(self.missing(kind.unwrap_or("pod or service"), &name)),
        }
    }

    fn endpoints(
        &self,
        service: &Service,
        port: Option<u16>,
    ) -> anyhow::Result<Vec<(&Workload, u16)>> {
        let ports: Vec<u16> = service.ports.iter().map(|port| port.port).collect();
        let number = one_port(port, &ports)?;
        let port = service.ports.iter().find(|port| port.port == number);
        let port =
            port.with_context(|| format!("service {} has no TCP port {number}", service.name))?;
        let endpoints: Vec<_> = self
            .pods
            .iter()
            .filter(|pod| service.selects(pod))
            .filter(|pod| match &service.pinned_identities {
                Some(pinned) => pinned.contains(&pod.identity),
                None => true,
            })
            .filter_map(|pod| Some((pod, port.target.on(pod)?)))
            .collect();
        ensure!(
            !endpoints.is_empty(),
            "service {} has no pod in {} that may run it",
            service.name,
            self.folder.display()
        );
        Ok(endpoints)
    }

    /// The server's address and the client's, of one family where there is one.
    fn route(&self, client: &Client, server: &Workload) -> anyhow::Result<(IpAddr, IpAddr)> {
        let address = server.addresses.first();
        let address = *address.with_context(|| format!("pod {} has no address", server.name))?;
        let Some(first) = client.addresses.first() else {
            ensure!(
                !looks_at_source(&self.policies),
                "policies look at the source's address, and no pod in {} is {}: say where it calls from with --source-ip",
                self.folder.display(),
                client.identity
            );
            return Ok((address, Ipv4Addr::UNSPECIFIED.into()));
        };
        let mut routes = server.addresses.iter().filter_map(|to| {
            let same = |from: &&IpAddr| from.is_ipv4() == to.is_ipv4();
            Some((*to, *client.addresses.iter().find(same)?))
        });
        Ok(routes.next().unwrap_or((address, *first)))
    }

    fn pod(&self, name: &ObjectName) -> Option<&Workload> {
        self.pods.iter().find(|pod| pod.name == *name)
    }

    fn missing(&self, what: &str, name: &ObjectName) -> String {
        format!(
            "{} has no {what} {name} that is part of the mesh (a pod needs status.podIP, a service a clusterIP)",
            self.folder.display()
        )
    }
}

fn one_port(asked: Option<u16>, known: &[u16]) -> anyhow::Result<u16> {
    match (asked, known) {
        (Some(port), _) => Ok(port),
        (None, [port]) => Ok(*port),
        (None, []) => bail!("add the port, as :80"),
        (None, known) => {
            let known: Vec<_> = known.iter().map(u16::to_string).collect();
            bail!("add one of the ports: {}", known.join(", "))
        }
    }
}

fn object_name(text: &str) -> anyhow::Result<ObjectName> {
    match text.split_once('/') {
        Some((namespace, name))
            if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
        {
            Ok(ObjectName {
                namespace: namespace.into(),
                name: name.into(),
            })
        }
        _ => bail!("is not NAMESPACE/NAME"),
    }
}

fn looks_at_source(policies: &Policies) -> bool {
    let rules = policies
        .objects()
        .iter()
        .flat_map(|object| match &**object {
            Object::Authorization(policy) => policy.rules.as_slice(),
            _ => &[],
        });
    rules.into_iter().any(|rule| {
        let source = rule
            .from
            .iter()
            .any(|from| !(from.blocks.is_empty() && from.remote_blocks.is_empty()));
        let is_address =
            |when: &Condition| matches!(when, Condition::SourceIp(_) | Condition::RemoteIp(_));
        source || rule.when.iter().any(is_address)
    })
}

/// A table, and whether all policies can be read.
fn list(manifests: &Manifests) -> anyhow::Result<(String, bool)> {
    let known = manifests.read()?;
    let mut rows = vec![["KIND", "NAME", "DOES", "SELECTOR", "PODS", "RULES"].map(str::to_owned)];
    let mut readable = true;
    for object in known.policies.objects() {
        let (does, selector, rules) = match &**object {
            Object::Authorization(policy) => {
                let dry = if policy.dry_run { " (dry run)" } else { "" };
                let does = format!("{}{dry}", policy.action.as_str());
                (does, &policy.selector, policy.rules.len().to_string())
            }
            Object::Peer(policy) => {
                let mode = policy.mode.map_or("UNSET", Mode::as_str);
                let ports = policy
                    .ports
                    .iter()
                    .map(|(port, mode)| format!(" {port}:{}", mode.as_str()));
                let does = format!("{mode}{}", ports.collect::<String>());
                (does, &policy.selector, "-".to_owned())
            }
            Object::Unreadable(unreadable) => {
                readable = false;
                ("REFUSED".to_owned(), &unreadable.selector, "-".to_owned())
            }
        };
        let selects = |pod: &&Workload| {
            known
                .policies
                .selects(object, &pod.name.namespace, &pod.labels)
        };
        rows.push([
            object.kind().to_string(),
            object.name().to_string(),
            does,
            match selector.is_empty() {
                true => "-".to_owned(),
                false => selector.to_string(),
            },
            known.pods.iter().filter(selects).count().to_string(),
            rules,
        ]);
    }
    let widths = std::array::from_fn::<usize, 6, _>(|column| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    });
    let mut text = String::new();
    for row in &rows {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    for warning in known.policies.warnings() {
        text.push_str(&format!("warning: {warning}\n"));
    }
    Ok((text, readable))
}

impl Manifests {
    /// Reads the whole folder. Fails with all that is wrong in it, but for policies: they are refused one by one.
    fn read(&self) -> anyhow::Result<Known> {
        let trust_domain: TrustDomain = self
            .trust_domain
            .parse()
            .with_context(|| format!("--trust-domain {:?}", self.trust_domain))?;
        let mut faults = Vec::new();
        let mut objects: BTreeMap<_, Arc<Object>> = BTreeMap::new();
        let (mut pods, mut services) = (Vec::<Workload>::new(), Vec::<Service>::new());
        for path in self.paths()? {
            let mut fault = |what: String| faults.push(format!("{}: {what}", path.display()));
            let documents = match documents(&path) {
                Ok(documents) => documents,
                Err(error) => {
                    fault(format!("{error:#}"));
                    continue;
                }
            };
            for document in documents {
                if let Some(object) = Object::read(&document) {
                    let key = (object.kind(), object.name().clone());
                    if objects.contains_key(&key) {
                        fault(format!("{} {} stands here a second time", key.0, key.1));
                    }
                    objects.insert(key, Arc::new(object));
                    continue;
                }
                for object in manifest::read(document, &trust_domain).unwrap_or_else(|error| {
                    fault(error);
                    Vec::new()
                }) {
                    match object {
                        manifest::Object::Pod(pod) => {
                            if pods.iter().any(|known| known.name == pod.name) {
                                fault(format!("Pod {} stands here a second time", pod.name));
                            }
                            pods.push(*pod);
                        }
                        manifest::Object::Service(service) => {
                            if services.iter().any(|known| known.name == service.name) {
                                fault(format!(
                                    "Service {} stands here a second time",
                                    service.name
                                ));
                            }
                            services.push(*service);
                        }
                    }
                }
            }
        }
        ensure!(faults.is_empty(), "{}", faults.join("\nauth-daemon: "));
        let settings = Settings {
            root_namespace: self.root_namespace.clone(),
            mode: match self.mode {
                DefaultMode::Strict => Mode::Strict,
                DefaultMode::Permissive => Mode::Permissive,
            },
        };
        Ok(Known {
            folder: self.files.clone(),
            pods,
            services,
            policies: Policies::compile(settings, objects.into_values()),
        })
    }

    fn paths(&self) -> anyhow::Result<Vec<PathBuf>> {
        let unreadable = || format!("--files {}", self.files.display());
        let mut paths = Vec::new();
        for entry in fs::read_dir(&self.files).with_context(unreadable)? {
            let path = entry.with_context(unreadable)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let manifest = [".yaml", ".yml", ".json"]
                .iter()
                .any(|end| name.ends_with(end));
            if manifest && !name.starts_with('.') {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    }
}

/// The objects of a file, those of lists singly.
fn documents(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = fs::read_to_string(path)?;
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text).context("is not YAML")?;
    let mut objects = Vec::new();
    for mut document in documents {
        let field = |name: &str| document[name].as_str().unwrap_or_default().to_owned();
        let (version, kind) = (field("apiVersion"), field("kind"));
        match (
            kind.strip_suffix("List"),
            document.get_mut("items").map(Value::take),
        ) {
            (Some(kind), Some(Value::Array(items))) => {
                objects.extend(items.into_iter().map(|mut item| {
                    // Items of a typed list leave out what the list already says.
                    if let (false, Value::Object(fields)) = (kind.is_empty(), &mut item) {
                        fields
                            .entry("apiVersion")
                            .or_insert_with(|| version.as_str().into());
                        fields.entry("kind").or_insert_with(|| kind.into());
                    }
                    item
                }))
            }
            (_, Some(items)) => {
                document["items"] = items;
                objects.push(document);
            }
            (_, None) => objects.push(document),
        }
    }
    Ok(objects)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESH: &str = "
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: web-1, namespace: shop, labels: {app: web}},
   spec: {serviceAccountName: web, containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]},
   status: {podIP: 10.0.0.1}}
- {apiVersion: v1, kind: Pod, metadata: {name: web-2, namespace: shop, labels: {app: web, canary: 'yes'}},
   spec: {serviceAccountName: web, containers: [{name: c, ports: [{name: http, containerPort: 8081}]}]},
   status: {podIP: 10.0.0.2}}
- {apiVersion: v1, kind: Pod, metadata: {name: front, namespace: shop},
   spec: {serviceAccountName: front, containers: []}, status: {podIP: 10.0.0.3}}
- {apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
   spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80, targetPort: http}]}}
";
    const POLICY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec: {selector: {matchLabels: {app: web}}, rules: [{from: [{source: {serviceAccounts: [front]}}]}]}
";

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new(policies: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("mesh.yaml"), MESH).unwrap();
            fs::write(folder.path().join("policies.yml"), policies).unwrap();
            fs::write(folder.path().join(".hidden.yaml"), "{").unwrap();
            Self(folder)
        }

        fn manifests(&self) -> Manifests {
            Manifests {
                files: self.0.path().to_owned(),
                trust_domain: "cluster.local".into(),
                root_namespace: "istio-system".into(),
                mode: DefaultMode::Strict,
            }
        }

        fn check(&self, from: &str, to: &str) -> Result<(String, bool), String> {
            let arguments = CheckArguments {
                from: from.into(),
                to: to.into(),
                source_ip: None,
                manifests: self.manifests(),
            };
            check(&arguments).map_err(|error| format!("{error:#}"))
        }
    }

    #[test]
    fn allowed_and_denied_with_the_rule_and_the_reasons() {
        let folder = Folder::new(POLICY);
        let (text, allowed) = folder.check("shop/front", "shop/web-1:8080").unwrap();
        assert!(allowed, "{text}");
        assert_eq!(
            text,
            "shop/front (spiffe://cluster.local/ns/shop/sa/front) at 10.0.0.3 to shop/web-1 at 10.0.0.1:8080:\n\
             allowed by AuthorizationPolicy shop/web rules[0]\n\
             mutual TLS: STRICT by the mesh's default\n  \
             AuthorizationPolicy shop/web (ALLOW): rules[0] matches\n"
        );
        let (text, allowed) = folder
            .check("spiffe://cluster.local/ns/a/sa/b", "shop/web")
            .unwrap();
        assert!(!allowed, "{text}");
        assert_eq!(
            text,
            "spiffe://cluster.local/ns/a/sa/b to shop/web-1 at 10.0.0.1:8080, and 1 more:\n\
             denied: no rule matches of AuthorizationPolicy shop/web\n\
             mutual TLS: STRICT by the mesh's default\n  \
             AuthorizationPolicy shop/web (ALLOW): does not match\n    \
             rules[0]: from: service account /ns/a/sa/b is not asked for\n"
        );
    }

    #[test]
    fn a_service_is_each_of_its_pods_at_its_own_port() {
        let folder = Folder::new(&format!(
            "{POLICY}---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{name: canary, namespace: shop}}\n\
             spec: {{action: DENY, selector: {{matchLabels: {{canary: 'yes'}}}}, \
             rules: [{{to: [{{operation: {{ports: ['8081']}}}}]}}]}}\n"
        ));
        let (text, allowed) = folder.check("shop/front", "shop/web:80").unwrap();
        assert!(!allowed);
        assert!(
            text.contains("to shop/web-1 at 10.0.0.1:8080:\nallowed by"),
            "{text}"
        );
        let denied =
            "to shop/web-2 at 10.0.0.2:8081:\ndenied by AuthorizationPolicy shop/canary rules[0]";
        assert!(text.contains(denied), "{text}");
        assert!(
            text.contains("does not select the workload: it selects canary=yes"),
            "{text}"
        );
    }

    #[test]
    fn what_cannot_be_told_says_what_is_missing() {
        let folder = Folder::new(POLICY);
        for (from, to, expected) in [
            (
                "front",
                "shop/web",
                "--from \"front\": is not NAMESPACE/NAME",
            ),
            (
                "spiffe://x",
                "shop/web",
                "--from \"spiffe://x\": path is not",
            ),
            ("shop/back", "shop/web", "has no pod shop/back"),
            ("shop/front", "shop/db", "has no pod or service shop/db"),
            (
                "shop/front",
                "shop/web:81",
                "service shop/web has no TCP port 81",
            ),
            ("shop/front", "shop/web:http", "\"http\" is not a port"),
            ("shop/web-1", "shop/front", "add the port"),
            ("shop/front", "pod/shop/web", "has no pod shop/web"),
        ] {
            let error = folder.check(from, to).unwrap_err();
            assert!(error.contains(expected), "{from} {to}: {error}");
        }
        let by_address = POLICY.replace("serviceAccounts: [front]", "ipBlocks: [10.0.0.3]");
        let folder = Folder::new(&by_address);
        let error = folder
            .check("spiffe://cluster.local/ns/a/sa/b", "shop/web")
            .unwrap_err();
        assert!(error.contains("--source-ip"), "{error}");
        assert!(
            folder
                .check("spiffe://cluster.local/ns/shop/sa/front", "shop/web")
                .unwrap()
                .1
        );

        let folder = Folder::new("apiVersion: v1\nkind: Pod\nmetadata: {name: 5}\n");
        let error = folder.check("shop/front", "shop/web").unwrap_err();
        assert!(error.contains("policies.yml: Pod"), "{error}");
        let folder = Folder::new(&format!("{POLICY}---\n{POLICY}"));
        let error = folder.check("shop/front", "shop/web").unwrap_err();
        assert!(
            error.contains("AuthorizationPolicy shop/web stands here a second time"),
            "{error}"
        );
    }

    #[test]
    fn lists_what_is_in_force_and_what_is_refused() {
        let folder = Folder::new(POLICY);
        let (text, readable) = list(&folder.manifests()).unwrap();
        assert!(readable);
        assert_eq!(
            text,
            "KIND                 NAME      DOES   SELECTOR  PODS  RULES\n\
             AuthorizationPolicy  shop/web  ALLOW  app=web   2     1\n"
        );
        let folder = Folder::new(&POLICY.replace("serviceAccounts", "ipBlocks"));
        let (text, readable) = list(&folder.manifests()).unwrap();
        assert!(!readable);
        assert!(text.contains("REFUSED"), "{text}");
        let warning = "warning: AuthorizationPolicy shop/web: spec.rules[0].from[0].source.ipBlocks[0]: \"front\" is \
                       not an IP address; it allows nobody instead";
        assert!(text.contains(warning), "{text}");
        assert!(!folder.check("shop/front", "shop/web").unwrap().1);
    }
}
