//! JWT-SVIDs for apps: requested when an app asks, and kept until half of their life is over.

use std::{
    collections::HashMap,
    fmt,
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use governor::{Quota, RateLimiter, clock::DefaultClock, state::keyed::HashMapStateStore};
use tonic::Status;

use super::{IssueError, Issuer};
use auth_jwt::{Audience, JwtSvid};
use auth_mesh::Identity;
use auth_tunnel::tls::unix_seconds;
use auth_workload_api::JwtIssuer;

/// Requests to the CA for one identity: at once, and a second in the long run. Half of what the CA grants an identity of a
/// node, so that apps cannot keep it from renewing certificates.
const BURST: NonZeroU32 = NonZeroU32::new(15).unwrap();
const PER_SECOND: NonZeroU32 = NonZeroU32::MIN;
/// Most tokens held of one identity, each for other audiences.
const MAX_HELD: usize = 64;

/// The JWT-SVIDs of this node's workloads.
pub(super) struct JwtSvids {
    issuer: Arc<dyn Issuer>,
    rates: RateLimiter<Identity, HashMapStateStore<Identity>, DefaultClock>,
    held: Mutex<HashMap<(Identity, Audience), Held>>,
}

/// A token.
#[derive(Clone)]
struct Held {
    token: String,
    /// When to request the next one, in seconds since the Unix epoch.
    renew: u64,
    /// When it expires.
    expires: u64,
}

impl JwtSvids {
    pub(super) fn new(issuer: Arc<dyn Issuer>) -> Self {
        Self {
            issuer,
            rates: RateLimiter::hashmap(Quota::per_second(PER_SECOND).allow_burst(BURST)),
            held: Mutex::default(),
        }
    }

    /// Requests a token.
    async fn request(&self, identity: &Identity, audience: &Audience) -> Result<Held, IssueError> {
        let token = self.issuer.issue_jwt(identity, audience).await?;
        let trust = self.issuer.trust().current();
        let keys = || trust.bundle.jwt_keys.clone();
        let svid = JwtSvid::validate(&token, audience.first(), |domain| {
            (domain.as_str() == trust.bundle.trust_domain.as_str()).then(keys)
        });
        let svid =
            svid.map_err(|error| format!("the CA answers with an unusable JWT-SVID: {error}"))?;
        if svid.id.as_str() != identity.as_str() {
            return Err(format!("the CA answers with a JWT-SVID of {}", svid.id.as_str()).into());
        }
        let now = unix_seconds(SystemTime::now());
        Ok(Held {
            token,
            renew: now + svid.expires.saturating_sub(now) / 2,
            expires: svid.expires,
        })
    }

    /// The token held for `audience`, if it has not expired.
    fn held(&self, key: &(Identity, Audience), now: u64) -> Option<Held> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.get(key).filter(|held| held.expires > now).cloned()
    }

    /// Holds a token in place of those that have expired, and of the first to expire of an identity that has many.
    fn hold(&self, key: (Identity, Audience), new: Held, now: u64) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|_, held| held.expires > now);
        let of_identity = || held.iter().filter(|((identity, _), _)| *identity == key.0);
        if of_identity().count() >= MAX_HELD {
            let first = of_identity().min_by_key(|(_, held)| held.expires);
            if let Some(first) = first.map(|(key, _)| key.clone()) {
                held.remove(&first);
            }
        }
        held.insert(key, new);
        self.rates.retain_recent();
    }
}

#[tonic::async_trait]
impl JwtIssuer for JwtSvids {
    async fn issue(&self, identity: &Identity, audience: &Audience) -> Result<String, Status> {
        let now = unix_seconds(SystemTime::now());
        let key = (identity.clone(), audience.clone());
        let held = self.held(&key, now);
        if let Some(held) = held.as_ref().filter(|held| held.renew > now) {
            return Ok(held.token.clone());
        }
        if self.rates.check_key(identity).is_err() {
            return held.map(|held| held.token).ok_or_else(|| {
                Status::resource_exhausted(format!(
                    "the workloads of {identity} on this node ask for more than {PER_SECOND} new JWT-SVID a second: ask for \
                     fewer audiences, and use a token until it expires"
                ))
            });
        }
        match (self.request(identity, audience).await, held) {
            (Ok(new), _) => {
                let token = new.token.clone();
                self.hold(key, new, now);
                Ok(token)
            }
            // Still valid, so the app need not know.
            (Err(error), Some(held)) => {
                tracing::warn!(%identity, %error, "JWT-SVID not renewed");
                Ok(held.token)
            }
            (Err(error), None) if error.unsupported => Err(Status::unimplemented(error.why)),
            (Err(error), None) => {
                tracing::error!(%identity, %error, "no JWT-SVID issued");
                Err(Status::unavailable(error.why))
            }
        }
    }
}

impl fmt::Debug for JwtSvids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtSvids").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, AtomicU64, Ordering},
        time::Duration,
    };

    use rcgen::KeyPair;
    use tonic::Code;

    use super::*;
    use crate::issuer::IssueFuture;
    use auth_jwt::SigningKey;
    use auth_mesh::TrustDomain;
    use auth_tunnel::tls::trust::{Trust, TrustBundle, TrustStore};

    /// Signs tokens of `web`, whoever asks.
    #[derive(Debug)]
    struct TestCa {
        key: SigningKey,
        trust: Arc<TrustStore>,
        /// Of tokens, in seconds.
        lifetime: AtomicU64,
        fails: AtomicBool,
    }

    impl Issuer for TestCa {
        fn issue_for<'a>(&'a self, _: &'a Identity, _: &'a [u8], _: Duration) -> IssueFuture<'a> {
            unreachable!("no certificate is asked for")
        }

        fn issue_jwt<'a>(
            &'a self,
            _: &'a Identity,
            audience: &'a Audience,
        ) -> IssueFuture<'a, String> {
            Box::pin(async move {
                if self.fails.load(Ordering::Relaxed) {
                    return Err("the CA is down".to_owned().into());
                }
                let now = unix_seconds(SystemTime::now());
                let expires = now + self.lifetime.load(Ordering::Relaxed);
                let token = self.key.sign(&web(), audience, now, expires);
                Ok(token.unwrap())
            })
        }

        fn trust(&self) -> &Arc<TrustStore> {
            &self.trust
        }
    }

    fn web() -> Identity {
        TrustDomain::default().identity("shop", "web").unwrap()
    }

    fn db() -> Audience {
        vec!["db".to_owned()].try_into().unwrap()
    }

    fn set() -> (Arc<TestCa>, JwtSvids) {
        let key = SigningKey::from_pem(&KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let bundle = TrustBundle {
            jwt_keys: [&key].into_iter().collect(),
            ..TrustBundle::of_roots(TrustDomain::default(), vec![])
        };
        let ca = Arc::new(TestCa {
            key,
            trust: Arc::new(TrustStore::new(Trust::fixed(bundle))),
            lifetime: 300.into(),
            fails: false.into(),
        });
        (ca.clone(), JwtSvids::new(ca))
    }

    #[tokio::test]
    async fn a_token_is_renewed_at_half_of_its_life_and_used_until_it_expires() {
        let (ca, jwts) = set();
        ca.lifetime.store(4, Ordering::Relaxed);
        let first = jwts.issue(&web(), &db()).await.unwrap();
        let again = jwts.issue(&web(), &db()).await.unwrap();
        assert_eq!(again, first);
        let renewed = loop {
            let token = jwts.issue(&web(), &db()).await.unwrap();
            if token != first {
                break token;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        ca.fails.store(true, Ordering::Relaxed);
        let expires = unix_seconds(SystemTime::now()) + 4;
        let (mut served, mut refused) = (0, None);
        while refused.is_none() {
            match jwts.issue(&web(), &db()).await {
                Ok(token) => {
                    assert_eq!(token, renewed);
                    served += 1;
                }
                Err(error) => refused = Some(error),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(served > 0 && unix_seconds(SystemTime::now()) >= expires - 1);
    }

    #[tokio::test]
    async fn unusable_answers_are_refused() {
        let (ca, jwts) = set();
        let other = TrustDomain::default().identity("shop", "other").unwrap();
        let refused = jwts.issue(&other, &db()).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable);
        assert!(refused.message().contains("JWT-SVID of"), "{refused}");
        let bundle = TrustBundle::of_roots(TrustDomain::default(), vec![]);
        ca.trust.publish(Trust::fixed(bundle));
        let refused = jwts.issue(&web(), &db()).await.unwrap_err();
        assert!(
            refused.message().contains("not signed with a key"),
            "{refused}"
        );
    }

    #[tokio::test]
    async fn few_tokens_of_an_identity_are_held() {
        let (_, jwts) = set();
        let now = unix_seconds(SystemTime::now());
        for number in 0..2 * MAX_HELD as u64 {
            let audience = Audience::try_from(vec![number.to_string()]).unwrap();
            let held = Held {
                token: String::new(),
                renew: now,
                expires: now + 1 + number,
            };
            jwts.hold((web(), audience), held, now);
        }
        let held = jwts.held.lock().unwrap();
        assert_eq!(held.len(), MAX_HELD);
        assert!(
            held.values()
                .all(|held| held.expires > now + MAX_HELD as u64)
        );
    }
}
