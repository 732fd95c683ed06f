//! Keeps the node's trust bundle current: by the CA's watch, or from the root file if the CA has none.

use std::{collections::HashMap, sync::Arc, time::Duration};

use auth_ca_api::auth::{
    Denial, Trust as Message, WatchRequest, trust_service_client::TrustServiceClient,
};
use rustls::{RootCertStore, pki_types::CertificateDer};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tonic::{Code, Streaming};
use x509_parser::{certificate::X509Certificate, prelude::FromDer, time::ASN1Time};

use super::link::{Link, explain_status};
use auth_jwt::JwtKeys;
use auth_mesh::{Identity, TrustDomain};
use auth_support::backoff;
use auth_tunnel::tls::{
    crl,
    trust::{Reason, Revocations, Trust, TrustBundle},
};

/// Largest message of the CA that is read, in bytes.
const MAX_MESSAGE: usize = 32 << 20;
const MAX_ROOTS: usize = 64;
const MAX_CRLS: usize = 256;
const MAX_DENIALS: usize = 100_000;
/// Until the first message of a watch.
const FIRST_MESSAGE: Duration = Duration::from_secs(5);
/// A dead connection is detected within two of these.
const PING: Duration = Duration::from_secs(1);
/// Between attempts. Revocations must be known two seconds after the CA is back.
const RETRY: Duration = Duration::from_millis(100);
const MAX_RETRY: Duration = Duration::from_secs(1);
/// How often the root file is read if the CA has no watch.
const READ_INTERVAL: Duration = Duration::from_secs(10);
/// After so many reads, the CA is asked again for a watch.
const READS_PER_ATTEMPT: u32 = 30;
/// How often the same failure is logged, at most.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Why a watch ended.
enum End {
    /// The CA has none, like istiod.
    Unimplemented,
    Failed(String),
}

/// Keeps the trust bundle of `link` current, forever. `contact` becomes true with the first message.
pub(super) async fn keep_current(link: Arc<Link>, contact: watch::Sender<bool>) {
    let mut failures = 0;
    let mut logged: Option<(Instant, String)> = None;
    loop {
        let mut received = false;
        let ended = follow(&link, || {
            received = true;
            link.health.watched();
            contact.send_replace(true);
        })
        .await;
        if received {
            failures = 0;
        }
        match ended {
            End::Unimplemented => {
                link.health.has_no_watch();
                tracing::info!(
                    address = link.address(),
                    "CA has no trust watch: roots come from ca.rootFile"
                );
                contact.send_replace(true);
                for _ in 0..READS_PER_ATTEMPT {
                    sleep(READ_INTERVAL).await;
                    take_root_file(&link);
                }
            }
            End::Failed(why) => {
                link.health.watch_failed(&why);
                let is_logged = logged
                    .as_ref()
                    .is_some_and(|(at, before)| *before == why && at.elapsed() < LOG_INTERVAL);
                if !is_logged {
                    tracing::error!(
                        address = link.address(), %why,
                        "trust watch failed; keeping the known trust bundle"
                    );
                    logged = Some((Instant::now(), why));
                }
                sleep(backoff::pause(RETRY, MAX_RETRY, failures, rand::random())).await;
                failures += 1;
            }
        }
    }
}

/// Applies the messages of one watch until it ends.
async fn follow(link: &Arc<Link>, mut received: impl FnMut()) -> End {
    let mut stream = match timeout(FIRST_MESSAGE, open(link)).await {
        Ok(Ok(opened)) => opened,
        Ok(Err(end)) => return end,
        Err(_) => return End::Failed(format!("no answer within {FIRST_MESSAGE:?}")),
    };
    let mut first = true;
    loop {
        // After the first message the CA is silent until something changes. Pings detect a dead connection.
        let patience = if first { FIRST_MESSAGE } else { Duration::MAX };
        let message = match timeout(patience, stream.message()).await {
            Ok(Ok(Some(message))) => message,
            Ok(Ok(None)) => return End::Failed("the CA has ended the watch".into()),
            Ok(Err(status)) if status.code() == Code::Unimplemented => return End::Unimplemented,
            Ok(Err(status)) => return End::Failed(explain_status(&status)),
            Err(_) => return End::Failed(format!("no message within {FIRST_MESSAGE:?}")),
        };
        first = false;
        if let Err(why) = apply(link, message) {
            return End::Failed(why);
        }
        received();
    }
}

async fn open(link: &Arc<Link>) -> Result<Streaming<Message>, End> {
    // A connection of its own: other servers close one that pings this often.
    let channel = link
        .channel(|endpoint| {
            endpoint
                .http2_keep_alive_interval(PING)
                .keep_alive_timeout(PING)
                .keep_alive_while_idle(true)
        })
        .map_err(End::Failed)?;
    let request = link.request(WatchRequest {}).await.map_err(End::Failed)?;
    let mut client = TrustServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    match client.watch(request).await {
        Ok(response) => Ok(response.into_inner()),
        Err(status) if status.code() == Code::Unimplemented => Err(End::Unimplemented),
        Err(status) => Err(End::Failed(explain_status(&status))),
    }
}

fn apply(link: &Link, message: Message) -> Result<(), String> {
    let known = link.trust.current();
    let trust = read(message, &known.bundle.trust_domain)
        .map_err(|why| format!("the CA's trust bundle is refused: {why}"))?;
    if !is_news(&known, &trust)? {
        return Ok(());
    }
    link.trust.publish(trust);
    let trust = link.trust.current();
    tracing::info!(
        version = trust.version,
        roots = trust.bundle.roots.len(),
        serials = trust.revoked.serials.len(),
        identities = trust.revoked.identities.len(),
        nodes = trust.revoked.nodes.len(),
        phase = trust.phase,
        "trust bundle updated"
    );
    Ok(())
}

/// Whether `new` replaces `known`. An older bundle, or another one of the same version, comes from a CA that has lost
/// state: it must not withdraw revocations.
fn is_news(known: &Trust, new: &Trust) -> Result<bool, String> {
    if known == new {
        return Ok(false);
    }
    let (old, version) = (known.version, new.version);
    let same = known.bundle == new.bundle && known.revoked == new.revoked;
    if version < old || (version == old && version != 0 && !same) {
        return Err(format!(
            "the CA is at version {version}, and was at {old} with other content: was it restored from a backup? \
             The earlier bundle stays in force until the CA's version is larger, or this daemon is restarted"
        ));
    }
    Ok(true)
}

/// Reads a message, of which everything must be valid: a part could be the wrong part.
fn read(message: Message, trust_domain: &TrustDomain) -> Result<Trust, String> {
    for (name, count, most) in [
        ("roots", message.roots.len(), MAX_ROOTS),
        ("intermediates", message.intermediates.len(), MAX_ROOTS),
        ("CRLs", message.crls.len(), MAX_CRLS),
        (
            "denied identities",
            message.denied_identities.len(),
            MAX_DENIALS,
        ),
        ("denied nodes", message.denied_nodes.len(), MAX_DENIALS),
    ] {
        if count > most {
            return Err(format!("{count} {name}; at most {most} are read"));
        }
    }
    let roots: Vec<CertificateDer<'static>> = message
        .roots
        .into_iter()
        .map(CertificateDer::from)
        .collect();
    check_roots(&roots)?;
    // The CA names its intermediates itself, on a connection where it has proven its identity.
    let intermediates = message.intermediates.into_iter().map(CertificateDer::from);
    let signers: Vec<_> = roots.iter().cloned().chain(intermediates).collect();
    let jwt_keys = match message.jwt_keys.is_empty() {
        true => JwtKeys::default(),
        false => JwtKeys::parse(&message.jwt_keys).map_err(|error| format!("jwt_keys {error}"))?,
    };
    let mut revoked = Revocations::default();
    for der in &message.crls {
        let entries = crl::read(der, &signers).map_err(|error| error.to_string())?;
        let entries = entries
            .into_iter()
            .map(|(serial, reason)| (serial.into(), reason));
        revoked.serials.extend(entries);
    }
    revoked.identities = denials(message.denied_identities, |name| {
        name.parse::<Identity>()
            .map_err(|error| format!("denied identity: {error}"))
    })?;
    revoked.nodes = denials(message.denied_nodes, |name| match name.len() {
        1..=253 => Ok(name.to_owned()),
        _ => Err("denied node: is not a node name".to_owned()),
    })?;
    Ok(Trust {
        version: message.version,
        bundle: TrustBundle {
            trust_domain: trust_domain.clone(),
            roots,
            jwt_keys,
        },
        revoked,
        phase: message
            .phase
            .chars()
            .filter(|c| !c.is_control())
            .take(256)
            .collect(),
    })
}

fn denials<K: std::hash::Hash + Eq>(
    denials: Vec<Denial>,
    key: impl Fn(&str) -> Result<K, String>,
) -> Result<HashMap<K, Reason>, String> {
    denials
        .into_iter()
        // A reason that this daemon does not know is still a denial.
        .map(|denial| {
            Ok((
                key(&denial.name)?,
                denial.reason.parse().unwrap_or_default(),
            ))
        })
        .collect()
}

/// All roots must be usable, and one of them valid now.
fn check_roots(roots: &[CertificateDer<'_>]) -> Result<(), String> {
    let mut store = RootCertStore::empty();
    let now = ASN1Time::now();
    let mut valid = false;
    for root in roots {
        store
            .add(root.clone().into_owned())
            .map_err(|error| format!("a root cannot be used: {error}"))?;
        let (_, root) = X509Certificate::from_der(root)
            .map_err(|_| "a root is not a certificate".to_owned())?;
        if !root.is_ca() {
            return Err("a root is not a CA certificate".into());
        }
        valid |= root.validity().is_valid_at(now);
    }
    if valid {
        Ok(())
    } else {
        Err("there is no root that is valid now; check the clocks (NTP) of CA and node".into())
    }
}

/// Takes the roots of the file.
fn take_root_file(link: &Link) {
    let known = link.trust.current();
    match link.access.roots() {
        Err(error) => tracing::error!(%error, "root file cannot be read; keeping the known roots"),
        Ok(roots) if roots == known.bundle.roots => {}
        Ok(roots) => {
            let count = roots.len();
            link.trust.publish(Trust {
                bundle: TrustBundle::of_roots(known.bundle.trust_domain.clone(), roots),
                ..(*known).clone()
            });
            tracing::info!(roots = count, "roots updated from the root file");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    fn domain() -> TrustDomain {
        "cluster.local".parse().unwrap()
    }

    fn certificate(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    fn message(change: impl FnOnce(&mut Message)) -> Message {
        let mut message = Message {
            version: 3,
            roots: vec![certificate(|_| {})],
            ..Default::default()
        };
        change(&mut message);
        message
    }

    fn denial(name: &str, reason: &str) -> Denial {
        Denial {
            name: name.into(),
            reason: reason.into(),
        }
    }

    #[test]
    fn reads_good_messages() {
        let trust = read(
            message(|m| {
                m.denied_identities =
                    vec![denial("spiffe://cluster.local/ns/a/sa/b", "keyCompromise")];
                m.denied_nodes = vec![denial("a", "news of tomorrow")];
                m.phase = "steady".into();
                m.jwt_keys = r#"{"keys": [{"kty": "new"}]}"#.into();
            }),
            &domain(),
        )
        .unwrap();
        assert_eq!((trust.version, trust.phase.as_str()), (3, "steady"));
        assert_eq!(trust.revoked.nodes["a"], Reason::Unspecified);
        let reasons: Vec<_> = trust.revoked.identities.values().collect();
        assert_eq!(reasons, [&Reason::KeyCompromise]);
    }

    #[test]
    fn refuses_bad_messages() {
        let expired = certificate(|p| {
            p.not_before = rcgen::date_time_ymd(2000, 1, 1);
            p.not_after = rcgen::date_time_ymd(2001, 1, 1);
        });
        let leaf = certificate(|p| p.is_ca = IsCa::ExplicitNoCa);
        for (bad, expected) in [
            (message(|m| m.roots.clear()), "no root"),
            (message(|m| m.roots = vec![expired]), "no root"),
            (message(|m| m.roots.push(vec![0x30, 0])), "cannot be used"),
            (message(|m| m.roots.push(leaf)), "not a CA certificate"),
            (
                message(|m| m.roots = vec![m.roots[0].clone(); 65]),
                "at most 64",
            ),
            (message(|m| m.crls = vec![vec![0x30, 0]]), "CRL"),
            (message(|m| m.jwt_keys = "x".into()), "jwt_keys is not"),
            (
                message(|m| m.denied_identities = vec![denial("web", "")]),
                "denied identity",
            ),
            (
                message(|m| m.denied_nodes = vec![denial("", "")]),
                "denied node",
            ),
        ] {
            let why = read(bad, &domain()).unwrap_err();
            assert!(why.contains(expected), "{why}");
        }
    }

    #[test]
    fn a_ca_that_lost_state_withdraws_nothing() {
        let at = |version, node: Option<&str>| {
            let mut trust = read(message(|m| m.version = version), &domain()).unwrap();
            trust.bundle.roots.clear();
            let nodes = node.map(|node| (node.to_owned(), Reason::default()));
            trust.revoked.nodes.extend(nodes);
            trust
        };
        let known = at(5, Some("a"));
        assert_eq!(is_news(&known, &known), Ok(false));
        assert_eq!(is_news(&known, &at(6, None)), Ok(true));
        assert!(is_news(&known, &at(4, Some("a"))).is_err());
        assert!(is_news(&known, &at(5, None)).is_err());
        let mut phase = known.clone();
        phase.phase = "spreading".into();
        assert_eq!(is_news(&known, &phase), Ok(true));
        assert_eq!(
            is_news(&at(0, None), &at(0, Some("a"))),
            Ok(true),
            "a root file"
        );
    }

    #[test]
    fn retries_within_a_second() {
        assert_eq!(backoff::pause(RETRY, MAX_RETRY, 0, 1.0), RETRY);
        assert_eq!(backoff::pause(RETRY, MAX_RETRY, 2, 0.0), 2 * RETRY);
        assert_eq!(backoff::pause(RETRY, MAX_RETRY, 1000, 1.0), MAX_RETRY);
    }

    proptest! {
        #[test]
        fn refuses_rubbish(
            root in prop::collection::vec(any::<u8>(), 0..64), crl in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            prop_assert!(read(message(|m| m.roots.push(root)), &domain()).is_err());
            prop_assert!(read(message(|m| m.crls.push(crl)), &domain()).is_err());
        }
    }
}
