//! A trust domain of SPIRE. Its server and our CA fetch each other's bundle, and its workloads call pods and are called.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_tests::{
    App, Ca, CaOptions, Context, Daemon, DaemonOptions, InProcess, Mesh, Package, Pod, PodSpec,
    Process, Result, Spire, SpireOptions, TIMEOUT, eventually_ok, slowdown,
    two_domains::foreign_service,
};
use rcgen::{CertificateParams, KeyPair};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use serde_json::{Value, json};

use crate::common::hostile::{
    ALPN, Authority, CONNECT, CONNECTED, DATA, END, Peer, Presented, RESET, client_config,
    connect_frame, dial, frame, lines_of,
};
use crate::common::with_ca::{spiffe, wait_certified};

/// The trust domain of our CA.
const OURS: &str = "cluster.local";
/// A workload of SPIRE.
const WORKLOAD: &str = "spiffe://spire.example/ns/shop/sa/web";
/// Port of the pod `web`, and of SPIRE's server on the host outside.
const ECHO: u16 = 7;
/// The address at which the pod `client` reaches SPIRE's server.
const SERVICE: &str = "10.96.0.7:7";
const PAGE: &str = include_str!("../../../docs/FEDERATION.md");
/// What the page calls the host of our CA.
const CA_ON_PAGE: &str = "ca.cluster.example";

/// Our pods and their CA, and SPIRE on a host of its own. Programs are dropped first.
struct Stage {
    _echo: App,
    daemon: Daemon,
    ca: Ca,
    spire: Spire,
    mesh: Mesh,
}

impl Stage {
    /// Starts both. `None` where no SPIRE can run: the test is then reported as skipped.
    fn start(test: &str, options: impl FnOnce(&Mesh) -> Result<Options>) -> Result<Option<Self>> {
        if let Some(why) = Spire::missing() {
            println!("SKIPPED {test}: {why}");
            return Ok(None);
        }
        let mesh = Mesh::builder()
            .node("ours")
            .node("spire")
            .pod(PodSpec::new("client").on("ours").service_account("client"))
            .pod(PodSpec::new("web").on("ours").service_account("web"))
            .start()?;
        let options = options(&mesh)?;
        let mut endpoint =
            json!({"listen": format!("{}:8443", mesh.outside_ipv4()), "refreshHint": "1s"});
        if let Some([certificate, key]) = &options.web {
            endpoint["certificateFile"] = json!(certificate);
            endpoint["keyFile"] = json!(key);
        }
        let ca = mesh.start_ca(&CaOptions::default().setting("bundleEndpoint", endpoint))?;
        // A minute is the least that SPIRE recommends, and more than a test should wait.
        let federation = block("hcl")?.replace("\"1m\"", "\"1s\"");
        let spire = Spire::start(mesh.node("spire").place(), &federation, &options.spire)?;
        let workload_api = json!({"accounts": ["default/client"], "socket": socket(&mesh)});
        let daemon_options = DaemonOptions::default().setting("workloadApi", workload_api);
        let mut daemon = mesh.node("ours").spawn_daemon(daemon_options.ca(&ca))?;
        daemon.wait_ready()?;
        daemon.wait_enrolled(&["default/client", "default/web"])?;
        wait_certified(&daemon)?;
        Ok(Some(Self {
            _echo: mesh
                .pod("web")
                .app(&format!("echo-server --port {ECHO} --quiet"))?
                .listening()?,
            daemon,
            ca,
            spire,
            mesh,
        }))
    }

    /// Runs the page's commands as SPIRE's operator. Returns the file with SPIRE's bundle that they write.
    fn run_commands(&self) -> Result<PathBuf> {
        let folder = self.spire.folder();
        fs::copy(self.ca.roots(), folder.join("root-cert.pem")).context("copying our roots")?;
        let host = self.mesh.outside_ipv4().to_string();
        let finished = self.spire.shell(&block("sh")?.replace(CA_ON_PAGE, &host))?;
        let finished = finished
            .ok()
            .with_context(|| format!("SPIRE's log: {}", self.spire.output()))?;
        assert!(
            finished.stdout.contains("-----BEGIN CERTIFICATE"),
            "{finished:?}"
        );
        Ok(folder.join("spire.example.json"))
    }

    fn url_of_spire(&self) -> String {
        format!(
            "https://{}:{}/",
            self.mesh.node("spire").ipv4(),
            Spire::PORT
        )
    }

    /// Makes the daemon trust SPIRE by the entry that the page has, with a bundle file.
    fn trust_spire(&self, file: &Path) -> Result<()> {
        let entry = json!({
            "trustDomain": Spire::TRUST_DOMAIN,
            "bundleEndpoint": {
                "url": self.url_of_spire(), "profile": "https_spiffe", "spiffeId": Spire::ENDPOINT,
            },
            "bundleFile": file,
        });
        self.daemon
            .edit_config(|config| config["federation"] = json!([entry]))
    }

    /// What the daemon says of SPIRE's bundle, once it comes from the endpoint and satisfies `is_so`.
    fn wait_bundle(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Result<Value> {
        eventually_ok(TIMEOUT, what, || {
            let shown = self.daemon.status_json()?["federation"][0].clone();
            anyhow::ensure!(shown["error"].is_null() && is_so(&shown), "{shown}");
            Ok(shown)
        })
    }

    fn web(&self) -> Pod {
        self.mesh.pod("web")
    }

    /// A new SVID of SPIRE.
    fn mint(&self, id: &str) -> Result<Presented> {
        let [chain, key] = self.spire.mint(id)?;
        let chain = CertificateDer::pem_file_iter(chain)?.collect::<Result<_, _>>()?;
        Ok(Presented {
            chain,
            key_pem: fs::read_to_string(key)?,
        })
    }

    /// Calls the pod `web` from the host outside.
    fn call(&self, presented: &Presented) -> Result<(Peer, Verdict)> {
        let tcp = dial(self.mesh.outside(), self.web().at(ECHO))?;
        let mut peer = Peer::client(tcp, client_config(Some(presented), &[ALPN])?)?;
        let local = peer.local();
        let client = SocketAddr::new(local.ip(), local.port() + 20_000);
        // The daemon may have refused it already.
        let _ = peer.send(&connect_frame(self.web().at(ECHO), client));
        let verdict = match peer.frame() {
            Ok(Some((CONNECTED, _))) => Verdict::Admitted,
            Ok(Some((RESET, payload))) if payload.first() == Some(&FORBIDDEN) => Verdict::Forbidden,
            Err(_) => {
                let line = &lines_of(&self.daemon, local)?[0];
                Verdict::Untrusted(line["reason"].as_str().unwrap_or_default().to_owned())
            }
            other => anyhow::bail!("{other:?}"),
        };
        Ok((peer, verdict))
    }

    /// Waits until calls with `presented` have this result.
    fn wait_verdict(&self, presented: &Presented, expected: &Verdict) -> Result<Peer> {
        eventually_ok(TIMEOUT, &format!("a call to be {expected:?}"), || {
            let (peer, verdict) = self.call(presented)?;
            anyhow::ensure!(verdict == *expected, "{verdict:?}");
            Ok(peer)
        })
    }

    /// Lets these principals call our pods, and no others.
    fn allow(&self, principals: &[&str]) -> Result<()> {
        self.mesh.node("ours").manifests().apply(&json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "partner", "namespace": "default"},
            "spec": {"rules": [{"from": [{"source": {"principals": principals}}]}]},
        }))
    }

    /// Whether the pod `client` reaches the workload of SPIRE.
    fn client_reaches(&self) -> Result<bool> {
        let command = format!("connect --to {SERVICE} --send hi --shutdown --read");
        let ended = self.mesh.pod("client").app(&command)?.finish(TIMEOUT)?;
        Ok(ended
            .json_lines()
            .last()
            .is_some_and(|last| last["text"] == "hi"))
    }
}

/// What differs between stages.
#[derive(Default)]
struct Options {
    spire: SpireOptions,
    /// The certificate and key of our endpoint, for the profile `https_web`.
    web: Option<[PathBuf; 2]>,
}

/// How a call ended.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Admitted,
    /// By a policy.
    Forbidden,
    /// By its certificate: the reason in the log.
    Untrusted(String),
}

/// The socket of the Workload API on our node.
fn socket(mesh: &Mesh) -> PathBuf {
    mesh.node("ours").place().folder().join("api/api.sock")
}

/// The code of a RESET.
const FORBIDDEN: u8 = 4;

/// The only block of a language in the page's section about SPIRE.
fn block(language: &str) -> Result<&'static str> {
    let (_, section) = PAGE
        .split_once("## Federate with SPIRE\n")
        .context("no section")?;
    let (_, rest) = section
        .split_once(&format!("```{language}\n"))
        .context("no block")?;
    Ok(rest.split_once("```").context("an endless block")?.0)
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>> {
    let all = CertificateDer::pem_slice_iter(pem.as_bytes());
    Ok(all.collect::<Result<_, _>>()?)
}

fn store(roots: Vec<CertificateDer<'static>>) -> Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root)?;
    }
    Ok(store)
}

/// Asserts that a call was refused for this reason.
fn assert_untrusted((_, verdict): (Peer, Verdict), what: &str, expected: &str) {
    match verdict {
        Verdict::Untrusted(reason) if reason.contains(expected) => println!("{what}: {reason}"),
        other => panic!("{what}: {other:?} instead of {expected:?}"),
    }
}

/// SPIRE below a CA of the test, which can sign any name with it.
fn upstream(mesh: &Mesh) -> Result<(Authority, SpireOptions)> {
    let (authority, certificate, key) = Authority::shared()?;
    let folder = mesh.node("spire").place().folder();
    let [certificate_file, key_file] =
        ["upstream.pem", "upstream.key"].map(|name| folder.join(name));
    fs::write(&certificate_file, certificate)?;
    fs::write(&key_file, key)?;
    let options = SpireOptions {
        upstream: Some([certificate_file, key_file]),
        ..SpireOptions::default()
    };
    Ok((authority, options))
}

#[test]
fn spire_workload_calls_while_an_entry_and_a_policy_say_so() -> Result<()> {
    let mut forger = None;
    let stage = Stage::start(
        "spire_workload_calls_while_an_entry_and_a_policy_say_so",
        |mesh| {
            let (authority, spire) = upstream(mesh)?;
            forger = Some(authority);
            Ok(Options {
                spire,
                ..Options::default()
            })
        },
    )?;
    let (Some(stage), Some(forger)) = (stage, forger) else {
        return Ok(());
    };
    let file = stage.run_commands()?;
    let workload = stage.mint(WORKLOAD)?;
    assert!(workload.chain.len() > 1, "an intermediate of SPIRE's");
    assert_untrusted(
        stage.call(&workload)?,
        "no entry",
        "of which no root is trusted",
    );

    let [own, foreign] =
        [OURS, Spire::TRUST_DOMAIN].map(|domain| format!("{domain}/ns/shop/sa/web"));
    stage.allow(&[&own])?;
    stage.trust_spire(&file)?;
    stage.wait_verdict(&workload, &Verdict::Forbidden)?;
    stage.allow(&[&own, &foreign])?;
    let mut live = stage.wait_verdict(&workload, &Verdict::Admitted)?;
    live.send(&frame(DATA, b"hello"))?;
    assert_eq!(live.read_data(5)?, b"hello");
    // What SPIRE has fetched verifies the pod.
    let ours = certificates(&stage.spire.bundle_of(OURS)?)?;
    let shown = live.tls.peer_certificates().context("no certificate")?;
    verify_server_cert_signed_by_trust_anchor(
        &ParsedCertificate::try_from(&shown[0])?,
        &store(ours)?,
        &shown[1..],
        UnixTime::now(),
        default_provider().signature_verification_algorithms.all,
    )?;
    let another = stage.mint("spiffe://spire.example/ns/shop/sa/other")?;
    assert_eq!(stage.call(&another)?.1, Verdict::Forbidden);
    let of_spire = stage.mint("spiffe://spire.example/payments")?;
    assert_untrusted(stage.call(&of_spire)?, "no account", "service account");

    // SPIRE issues no name of ours, and the CA above it, which can, is not trusted for one.
    let our_name = format!("spiffe://{own}");
    assert!(stage.spire.mint(&our_name).is_err());
    let forged = forger.mint_with(&[&our_name], |_| {})?;
    let reason = "not issued by its trust domain's CA";
    assert_untrusted(stage.call(&forged)?, "our name", reason);
    let direct = forger.mint_with(&[WORKLOAD], |_| {})?;
    assert_eq!(stage.call(&direct)?.1, Verdict::Admitted);

    let start = Instant::now();
    stage
        .daemon
        .edit_config(|config| config["federation"] = json!([]))?;
    let ended = live.end();
    let took = start.elapsed();
    println!("without its entry: {ended:?} after {took:?}");
    assert!(took < Duration::from_secs(2) * slowdown(), "{took:?}");
    assert_untrusted(
        stage.call(&workload)?,
        "no entry",
        "of which no root is trusted",
    );
    Ok(())
}

#[test]
fn pod_calls_spire_workload() -> Result<()> {
    let Some(stage) = Stage::start("pod_calls_spire_workload", |_| Ok(Options::default()))? else {
        return Ok(());
    };
    let file = stage.run_commands()?;
    let at = SocketAddr::from((stage.mesh.outside_ipv4(), ECHO));
    let manifests = stage.mesh.node("ours").manifests();
    foreign_service(manifests, SERVICE.parse()?, WORKLOAD, at)?;
    // It verifies its callers with what SPIRE has fetched.
    let serve = |id: &str| -> Result<InProcess> {
        let callers = store(certificates(&stage.spire.bundle_of(OURS)?)?)?;
        let provider = Arc::new(default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(callers), provider.clone())
                .build()?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(stage.mint(id)?.resolver()?);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        InProcess::start(stage.mesh.outside(), at, move |tcp, _| {
            let Ok(mut peer) = Peer::server(tcp, config.clone()) else {
                return;
            };
            while let Ok(Some((kind, payload))) = peer.frame() {
                let answer = match kind {
                    CONNECT => frame(CONNECTED, b""),
                    _ => frame(kind, &payload),
                };
                // One connection of an app: the next one sees the next server's certificate.
                if peer.send(&answer).is_err() || kind == END {
                    let _ = peer.close_notify();
                    return;
                }
            }
        })
    };
    let server = serve(WORKLOAD)?;
    assert!(!stage.client_reaches()?, "no entry");
    stage.trust_spire(&file)?;
    eventually_ok(TIMEOUT, "the workload of SPIRE to be reached", || {
        anyhow::ensure!(stage.client_reaches()?, "refused");
        Ok(())
    })?;
    let line = stage
        .daemon
        .wait_for_access("the call", TIMEOUT, |line| line["result"] == "ok")?;
    assert_eq!(line["server_identity"], WORKLOAD, "{line:#}");
    assert_eq!(line["path"], "tunnel", "{line:#}");

    // Another workload of SPIRE may not run the service.
    drop(server);
    let start = stage.daemon.log_position();
    let _other = serve("spiffe://spire.example/ns/shop/sa/other")?;
    assert!(!stage.client_reaches()?);
    stage
        .daemon
        .wait_for_log_after(start, "the refusal", TIMEOUT, |line| {
            let reason = line["reason"].as_str().unwrap_or_default();
            reason.contains("sa/other") && reason.contains("but may only be")
        })?;
    Ok(())
}

#[test]
fn jwts_are_valid_in_both_trust_domains() -> Result<()> {
    const TEST: &str = "jwts_are_valid_in_both_trust_domains";
    let Some(packages) = Package::folders(TEST, &Package::SPIFFE) else {
        return Ok(());
    };
    let Some(stage) = Stage::start(TEST, |_| Ok(Options::default()))? else {
        return Ok(());
    };
    let file = stage.run_commands()?;
    stage.trust_spire(&file)?;
    stage.wait_bundle("SPIRE's bundle", |shown| shown["roots"] == 1)?;
    let mint = ["jwt", "mint", "-spiffeID", WORKLOAD, "-audience", "ours"];
    let token = stage.spire.run(&mint)?;
    let known = stage.spire.folder().join("ours.json");
    let bundle = ["bundle", "list", "-id", OURS, "-format", "spiffe"];
    fs::write(&known, stage.spire.run(&bundle)?)?;
    let mut command = stage.mesh.pod("client").command("python3")?;
    command
        .args(["-c", include_str!("python/spire_jwt.py"), token.trim()])
        .arg(&known)
        .env("PYTHONPATH", std::env::join_paths(&packages)?)
        .env(
            "SPIFFE_ENDPOINT_SOCKET",
            format!("unix://{}", socket(&stage.mesh).display()),
        );
    let done = Process::spawn(command)?.finish(TIMEOUT)?.ok()?;
    let shown = &done.json_lines()[0];
    assert_eq!(shown["foreign"], WORKLOAD, "{shown}");
    assert_eq!(shown["own"], spiffe("client"), "{shown}");
    Ok(())
}

#[test]
fn both_follow_rotations() -> Result<()> {
    let Some(stage) = Stage::start("both_follow_rotations", |_| Ok(Options::default()))? else {
        return Ok(());
    };
    let file = stage.run_commands()?;
    let document = stage.spire.bundle()?;
    let keys = document["keys"].as_array().context("no keys")?;
    let of = |purpose: &str| keys.iter().filter(|key| key["use"] == purpose).count();
    assert_eq!((of("x509-svid"), of("jwt-svid")), (1, 1), "{document}");
    stage.trust_spire(&file)?;
    let has = |roots: usize| move |shown: &Value| shown["roots"] == roots;
    let shown = stage.wait_bundle("SPIRE's root, and no other key", has(1))?;
    let old = stage.mint(WORKLOAD)?;
    stage.wait_verdict(&old, &Verdict::Admitted)?;

    // SPIRE's.
    let prepared = stage
        .spire
        .run(&["localauthority", "x509", "prepare", "-output", "json"])?;
    let prepared: Value = serde_json::from_str(&prepared)?;
    let id = prepared["prepared_authority"]["authority_id"]
        .as_str()
        .with_context(|| prepared.to_string())?;
    let both = stage.wait_bundle("SPIRE's next root", has(2))?;
    assert!(
        both["sequence"].as_u64() > shown["sequence"].as_u64(),
        "{both}"
    );
    let authority = |verb: &str, id: &str| {
        stage
            .spire
            .run(&["localauthority", "x509", verb, "-authorityID", id])
    };
    authority("activate", id)?;
    let new = stage.mint(WORKLOAD)?;
    assert_eq!(stage.call(&new)?.1, Verdict::Admitted);
    assert_eq!(stage.call(&old)?.1, Verdict::Admitted);
    let state = stage
        .spire
        .run(&["localauthority", "x509", "show", "-output", "json"])?;
    let state: Value = serde_json::from_str(&state)?;
    let former = state["old"]["authority_id"]
        .as_str()
        .with_context(|| state.to_string())?;
    authority("taint", former)?;
    authority("revoke", former)?;
    stage.wait_bundle("the revoked root to be gone", has(1))?;
    let reason = "not issued by its trust domain's CA";
    assert_untrusted(stage.call(&old)?, "the revoked root", reason);
    assert_eq!(stage.call(&new)?.1, Verdict::Admitted);

    // Ours.
    let before = certificates(&stage.spire.bundle_of(OURS)?)?;
    assert_eq!(
        before,
        certificates(&fs::read_to_string(stage.ca.roots())?)?
    );
    stage.ca.operate(&["rotate-root"])?.ok()?;
    eventually_ok(TIMEOUT, "SPIRE to have both of our roots", || {
        stage.spire.run(&["federation", "refresh", "-id", OURS])?;
        let known = certificates(&stage.spire.bundle_of(OURS)?)?;
        let ours = certificates(&fs::read_to_string(stage.ca.roots())?)?;
        anyhow::ensure!(known.len() == 2 && known == ours, "{} roots", known.len());
        let list = ["bundle", "list", "-id", OURS, "-format", "spiffe"];
        let document = stage.spire.run(&list)?;
        let keys = document.matches("jwt-svid").count();
        anyhow::ensure!(keys == 2, "{keys} keys of JWT-SVIDs: {document}");
        Ok(())
    })
}

#[test]
fn both_serve_by_web_certificates() -> Result<()> {
    let mut trusted = PathBuf::new();
    let stage = Stage::start("both_serve_by_web_certificates", |mesh| {
        let names = [
            mesh.outside_ipv4().to_string(),
            mesh.node("spire").ipv4().to_string(),
        ];
        let folder = mesh.node("spire").place().folder();
        let [certificate, key] = ["web.pem", "web.key"].map(|name| folder.join(name));
        let pair = KeyPair::generate()?;
        let signed = CertificateParams::new(names)?.self_signed(&pair)?;
        fs::write(&certificate, signed.pem())?;
        fs::write(&key, pair.serialize_pem())?;
        trusted.clone_from(&certificate);
        let web = Some([certificate.clone(), key]);
        let spire = SpireOptions {
            web: web.clone(),
            web_roots: Some(certificate),
            ..SpireOptions::default()
        };
        Ok(Options { spire, web })
    })?;
    let Some(stage) = stage else {
        return Ok(());
    };
    let url = format!("https://{}:8443/", stage.mesh.outside_ipv4());
    let create = "federation create -bundleEndpointProfile https_web -trustDomain cluster.local -bundleEndpointURL";
    let create: Vec<_> = create.split(' ').chain([url.as_str()]).collect();
    stage.spire.run(&create)?;
    stage.spire.run(&["federation", "refresh", "-id", OURS])?;
    assert_eq!(
        certificates(&stage.spire.bundle_of(OURS)?)?,
        certificates(&fs::read_to_string(stage.ca.roots())?)?
    );
    let entry = json!({
        "trustDomain": Spire::TRUST_DOMAIN,
        "bundleEndpoint": {"url": stage.url_of_spire(), "profile": "https_web", "rootFile": trusted},
    });
    stage
        .daemon
        .edit_config(|config| config["federation"] = json!([entry]))?;
    let workload = stage.mint(WORKLOAD)?;
    stage.wait_verdict(&workload, &Verdict::Admitted)?;
    Ok(())
}
