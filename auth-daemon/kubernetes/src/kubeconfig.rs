//! Kubeconfigs that others wrote: credentials and addresses, never a program to run or a file to read.

use std::time::Duration;

use kube::{
    Client, Config,
    client::ClientBuilder,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Map, Value, json};
use tower::layer::layer_fn;

use super::{NoCluster, limits::Limited, printable, verifying, with_causes};

/// Maximum size of a kubeconfig, in bytes.
pub const MAX_KUBECONFIG_BYTES: usize = 64 << 10;
/// Time without a byte from the API server after which a connection is given up. Longer than a watch lasts.
const SILENCE: Duration = Duration::from_secs(150);
/// How long each watch lasts, in seconds, before the next one continues from there: an API server that has vanished without
/// closing its connections is noticed by then.
pub const WATCH_SECONDS: u32 = 120;

/// The fields that a cluster and a user may have. All others are refused, whichever context they belong to: programs to run
/// (`exec`, `auth-provider`), files of this machine, proxies, other users' names.
const OF_CLUSTER: [&str; 3] = ["server", "certificate-authority-data", "tls-server-name"];
const OF_USER: [&str; 3] = ["token", "client-certificate-data", "client-key-data"];

/// Creates a client for the current context of `kubeconfig`, which is not trusted. Sends nothing yet. Errors name
/// fields, and quote no value. Responses have a limit of 16 MiB, and those of watches one of 4 MiB for each line.
pub async fn connect_by(kubeconfig: &[u8]) -> Result<Client, NoCluster> {
    let checked = checked(kubeconfig)
        .map_err(|why| NoCluster(format!("the kubeconfig cannot be used: {why}")))?;
    let config = Config::from_custom_kubeconfig(checked, &KubeConfigOptions::default()).await;
    let mut config = config.map_err(|error| NoCluster(with_causes(&error)))?;
    config.read_timeout = Some(SILENCE);
    config.reset_reader_on_write = true;
    config.proxy_url = None;
    let builder = ClientBuilder::try_from(verifying(config)?);
    let builder = builder.map_err(|error| NoCluster(with_causes(&error)))?;
    Ok(builder.with_layer(&layer_fn(Limited)).build())
}

/// Returns the cluster and the user of the current context of `kubeconfig`. Fails if it has a field that is not allowed.
fn checked(kubeconfig: &[u8]) -> Result<Kubeconfig, String> {
    if kubeconfig.len() > MAX_KUBECONFIG_BYTES {
        return Err(format!("it is longer than {MAX_KUBECONFIG_BYTES} bytes"));
    }
    let text = std::str::from_utf8(kubeconfig).map_err(|_| "it is not UTF-8")?;
    // The parser's errors quote the file.
    let root: Value = serde_saphyr::from_str(text).map_err(|error| match error.location() {
        Some(at) => format!(
            "it is not YAML (line {}, column {})",
            at.line(),
            at.column()
        ),
        None => "it is not YAML".to_owned(),
    })?;
    for (list, section, allowed) in [
        ("clusters", "cluster", OF_CLUSTER),
        ("users", "user", OF_USER),
    ] {
        for entry in root[list].as_array().into_iter().flatten() {
            let fields = entry[section].as_object().into_iter().flat_map(Map::keys);
            for field in fields {
                if !allowed.contains(&field.as_str()) {
                    let (field, allowed) = (printable(field), allowed.join(", "));
                    return Err(format!(
                        "{list}[].{section}.{field} is not allowed; allowed are {allowed}"
                    ));
                }
            }
        }
    }
    let current = named(&root, "contexts", "context", &root["current-context"])
        .ok_or("there is no context of the name current-context")?;
    let cluster = named(&root, "clusters", "cluster", &current["cluster"])
        .ok_or("the current context names no cluster")?;
    let user = named(&root, "users", "user", &current["user"])
        .ok_or("the current context names no user")?;
    let server = cluster["server"].as_str().unwrap_or_default();
    if !server.starts_with("https://") {
        return Err(
            "the cluster's server does not begin with https://; only TLS keeps the token and what is read secret: give it \
             the API server's https:// URL"
                .into(),
        );
    }
    if !cluster["certificate-authority-data"].is_string() {
        return Err("the cluster has no certificate-authority-data".into());
    }
    let checked = json!({
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "c", "user": user}],
    });
    serde_json::from_value(checked).map_err(|_| "a field is no text".to_owned())
}

/// Returns the `section` of the entry `name` in a list of the kubeconfig.
fn named<'a>(root: &'a Value, list: &str, section: &str, name: &Value) -> Option<&'a Value> {
    let mut entries = root[list].as_array()?.iter();
    let entry = entries.find(|entry| name.is_string() && entry["name"] == *name)?;
    Some(&entry[section]).filter(|section| section.is_object())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::StreamExt;
    use k8s_openapi::ByteString;
    use kube::{Api, runtime::watcher};
    use rcgen::CertifiedKey;
    use rustls::{ServerConfig, crypto::aws_lc_rs, pki_types::PrivateKeyDer};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };
    use tokio_rustls::TlsAcceptor;

    use super::*;
    use crate::{follow_or_fail, objects};

    /// Starts an API server that answers with 64 MiB of nothing. Returns a kubeconfig for it.
    async fn talkative() -> String {
        let CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let key = PrivateKeyDer::Pkcs8(signing_key.serialize_der().into());
        let tls = ServerConfig::builder_with_provider(aws_lc_rs::default_provider().into())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = format!("https://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let acceptor = TlsAcceptor::from(Arc::new(tls));
            while let Ok((tcp, _)) = listener.accept().await {
                let mut stream = acceptor.accept(tcp).await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await;
                let mut next = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
                for _ in 0..1024 {
                    if next.is_err() {
                        break;
                    }
                    next = stream.write_all(&[b' '; 64 << 10]).await;
                }
                let _ = stream.shutdown().await;
            }
        });
        let mut config = kubeconfig();
        let authority = ByteString(cert.pem().into_bytes());
        config["clusters"][0]["cluster"] =
            json!({"server": server, "certificate-authority-data": authority});
        config.to_string()
    }

    #[tokio::test]
    async fn a_response_of_any_length_is_not_read() {
        let client = connect_by(talkative().await.as_bytes()).await.unwrap();
        let pods: Api<objects::Pod> = Api::all(client);
        let config = watcher::Config::default();
        let mut events = Box::pin(follow_or_fail(pods, config, |_| Ok(())));
        assert_eq!(events.next().await, Some(Ok(())), "a list begins");
        let error = events.next().await.unwrap().unwrap_err();
        assert!(error.contains("longer than 16777216 bytes"), "{error}");
    }

    fn kubeconfig() -> Value {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "east", "preferences": {},
            "clusters": [{"name": "east", "cluster": {
                "server": "https://192.0.2.1:6443", "certificate-authority-data": "LS0tLS1",
            }}],
            "contexts": [{"name": "east", "context": {"cluster": "east", "user": "reader", "namespace": "x"}}],
            "users": [{"name": "reader", "user": {"token": "s3cret"}}],
        })
    }

    #[test]
    fn the_current_context_is_read() {
        let read = checked(kubeconfig().to_string().as_bytes()).unwrap();
        let cluster = read.clusters[0].cluster.as_ref().unwrap();
        assert_eq!(cluster.server.as_deref(), Some("https://192.0.2.1:6443"));
        assert!(
            read.auth_infos[0]
                .auth_info
                .as_ref()
                .unwrap()
                .token
                .is_some()
        );
    }

    #[test]
    fn the_documented_kubeconfig_is_one() {
        let page = include_str!("../../../docs/MULTICLUSTER.md");
        let (_, rest) = page.split_once("  east: |\n").unwrap();
        let (text, _) = rest.split_once("END\n").unwrap();
        let text = [
            ("$SERVER", "https://east.example:6443"),
            ("$(field 'ca\\.crt')", "LS0tLS1+/w=="),
            ("$(field token | base64 --decode)", "a-b.c_d.e"),
        ]
        .iter()
        .fold(text.to_owned(), |text, (field, value)| {
            text.replace(field, value)
        });
        assert!(!text.contains('$'), "{text}");
        let read = checked(text.as_bytes()).unwrap();
        let cluster = read.clusters[0].cluster.as_ref().unwrap();
        let authority = cluster.certificate_authority_data.as_deref();
        assert_eq!(authority, Some("LS0tLS1+/w=="));
    }

    #[test]
    fn programs_files_and_other_things_are_refused_in_every_entry() {
        for (list, section, field, value) in [
            ("users", "user", "exec", json!({"command": "/bin/sh"})),
            ("users", "user", "auth-provider", json!({"name": "gcp"})),
            ("users", "user", "tokenFile", json!("/etc/shadow")),
            ("users", "user", "client-key", json!("/etc/shadow")),
            ("users", "user", "client-certificate", json!("/etc/shadow")),
            ("users", "user", "as", json!("admin")),
            ("users", "user", "password", json!("s3cret")),
            (
                "clusters",
                "cluster",
                "certificate-authority",
                json!("/etc/shadow"),
            ),
            (
                "clusters",
                "cluster",
                "insecure-skip-tls-verify",
                json!(true),
            ),
            (
                "clusters",
                "cluster",
                "proxy-url",
                json!("http://192.0.2.2"),
            ),
        ] {
            for other in [false, true] {
                let mut config = kubeconfig();
                if other {
                    let entry = json!({"name": "other", section: {}});
                    config[list].as_array_mut().unwrap().push(entry);
                }
                config[list][usize::from(other)][section][field] = value.clone();
                let error = checked(config.to_string().as_bytes()).unwrap_err();
                assert!(
                    error.contains(&format!("{section}.{field} is not allowed")),
                    "{error}"
                );
                assert!(!error.contains("s3cret"), "{error}");
            }
        }
    }

    #[test]
    fn what_is_missing_or_wrong_is_named_without_its_value() {
        let without = |path: &[&str], value: Value| {
            let mut config = kubeconfig();
            let mut at = &mut config;
            for step in path {
                at = match step.parse::<usize>() {
                    Ok(index) => &mut at[index],
                    Err(_) => &mut at[*step],
                };
            }
            *at = value;
            config.to_string()
        };
        let long = "x".repeat(MAX_KUBECONFIG_BYTES + 1);
        for (text, expected) in [
            (without(&["current-context"], json!("west")), "no context"),
            (without(&["current-context"], Value::Null), "no context"),
            (
                without(&["contexts", "0", "context", "cluster"], json!("west")),
                "names no cluster",
            ),
            (
                without(&["contexts", "0", "context", "user"], json!("west")),
                "names no user",
            ),
            (
                without(&["users", "0", "user", "token"], json!(["s3cret"])),
                "no text",
            ),
            (
                without(
                    &["clusters", "0", "cluster", "certificate-authority-data"],
                    Value::Null,
                ),
                "no certificate-authority-data",
            ),
            (
                without(
                    &["clusters", "0", "cluster", "server"],
                    json!("http://s3cret:80"),
                ),
                "give it the API server's https:// URL",
            ),
            (
                without(&["clusters", "0", "cluster", "server"], Value::Null),
                "does not begin with https://",
            ),
            ("[]".into(), "no context"),
            ("s3cret: [".into(), "not YAML (line"),
            (long, "longer than"),
        ] {
            let error = checked(text.as_bytes()).unwrap_err();
            assert!(
                error.contains(expected) && !error.contains("s3cret"),
                "{error}"
            );
        }
        assert_eq!(checked(b"\xff").unwrap_err(), "it is not UTF-8");
    }
}
