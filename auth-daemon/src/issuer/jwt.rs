//! JWT-SVIDs for apps: requested when an app asks for one, and kept for half of their life.

use std::{
    collections::HashMap,
    fmt,
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use futures_util::future::{BoxFuture, FutureExt, Shared, WeakShared};
use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter, clock::DefaultClock,
    state::keyed::HashMapStateStore,
};
use tonic::{Code, Status};

use super::{IssueError, Issuer};
use auth_jwt::{Audience, JwtSvid};
use auth_mesh::Identity;
use auth_tunnel::tls::unix_seconds;
use auth_workload_api::JwtIssuer;

/// Requests to the CA for one identity: at once, and per second in the long run. These are half of what the CA grants an
/// identity of a node, so that apps cannot keep it from renewing certificates.
const BURST: NonZeroU32 = NonZeroU32::new(15).unwrap();
const PER_SECOND: NonZeroU32 = NonZeroU32::MIN;
/// Requests to the CA for all identities, which for the same reason are half of what it grants a node.
const NODE_BURST: NonZeroU32 = NonZeroU32::new(500).unwrap();
const NODE_PER_SECOND: NonZeroU32 = NonZeroU32::new(25).unwrap();
/// Maximum number of tokens that are kept of one identity, each for other audiences.
const MAX_HELD: usize = 64;

/// Whose token it is, and for whom.
type Key = (Identity, Audience);
/// A request to the CA, for which all who need its token wait together.
type Request = Shared<Answer>;
type Answer = BoxFuture<'static, Result<Held, IssueError>>;

/// The JWT-SVIDs of this node's workloads.
pub(super) struct JwtSvids {
    issuer: Arc<dyn Issuer>,
    of_identity: RateLimiter<Identity, HashMapStateStore<Identity>, DefaultClock>,
    of_node: DefaultDirectRateLimiter,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    held: HashMap<Key, Held>,
    /// Dead as soon as nobody waits for the answer any more.
    requests: HashMap<Key, WeakShared<Answer>>,
    /// The last answer, if it was that the CA issues no tokens.
    unsupported: Option<IssueError>,
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
        let of_node = Quota::per_second(NODE_PER_SECOND).allow_burst(NODE_BURST);
        Self {
            issuer,
            of_identity: RateLimiter::hashmap(Quota::per_second(PER_SECOND).allow_burst(BURST)),
            of_node: RateLimiter::direct(of_node),
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the request for a token that is in progress, or starts one within the limits.
    fn request(&self, state: &mut State, key: &Key) -> Result<Request, IssueError> {
        let running = state.requests.get(key).and_then(WeakShared::upgrade);
        if let Some(running) = running {
            return Ok(running);
        }
        self.of_identity.retain_recent();
        let (identity, _) = key;
        let over = if self.of_identity.check_key(identity).is_err() {
            Some(format!(
                "the workloads of {identity} on this node request more than {PER_SECOND} new JWT-SVID a second: request \
                 fewer audiences, and try again in a second"
            ))
        } else if self.of_node.check().is_err() {
            Some(format!(
                "the workloads of this node request more than {NODE_PER_SECOND} new JWT-SVIDs a second: try again in a \
                 second"
            ))
        } else {
            None
        };
        if let Some(why) = over {
            return Err(state.unsupported.clone().unwrap_or(IssueError {
                code: Code::ResourceExhausted,
                ..IssueError::from(why)
            }));
        }
        let request = request(self.issuer.clone(), key.clone()).boxed().shared();
        let requests = &mut state.requests;
        requests.retain(|_, request| request.upgrade().is_some());
        requests.extend(request.downgrade().map(|weak| (key.clone(), weak)));
        Ok(request)
    }
}

impl State {
    /// Keeps a token. Drops those that have expired and, if the identity has too many, the one that expires first.
    fn hold(&mut self, key: Key, new: Held, now: u64) {
        self.held.retain(|_, held| held.expires > now);
        let of_identity = || (self.held.iter()).filter(|((identity, _), _)| *identity == key.0);
        if of_identity().count() >= MAX_HELD {
            let first = of_identity().min_by_key(|(_, held)| held.expires);
            if let Some(first) = first.map(|(key, _)| key.clone()) {
                self.held.remove(&first);
            }
        }
        self.held.insert(key, new);
    }
}

async fn request(issuer: Arc<dyn Issuer>, (identity, audience): Key) -> Result<Held, IssueError> {
    let answer = issuer.issue_jwt(&identity, &audience).await;
    let held = answer.and_then(|token| Ok(check(&*issuer, &identity, &audience, token)?));
    if let Err(error) = &held
        && error.code != Code::Unimplemented
    {
        tracing::error!(%identity, %error, "no JWT-SVID issued");
    }
    held
}

/// Fails unless the token is what was requested.
fn check(
    issuer: &dyn Issuer,
    identity: &Identity,
    audience: &Audience,
    token: String,
) -> Result<Held, String> {
    let trust = issuer.trust().current();
    let svid = JwtSvid::validate(&token, audience.first(), |domain| {
        let is_own = domain.as_str() == trust.bundle.trust_domain.as_str();
        is_own.then(|| trust.bundle.jwt_keys.clone())
    });
    let svid =
        svid.map_err(|error| format!("the CA answers with an unusable JWT-SVID: {error}"))?;
    if svid.id.as_str() != identity.as_str() {
        let id = svid.id.as_str();
        return Err(format!("the CA answers with a JWT-SVID of {id}"));
    }
    let now = unix_seconds(SystemTime::now());
    Ok(Held {
        token,
        renew: now + svid.expires.saturating_sub(now) / 2,
        expires: svid.expires,
    })
}

#[tonic::async_trait]
impl JwtIssuer for JwtSvids {
    async fn issue(&self, identity: &Identity, audience: &Audience) -> Result<String, Status> {
        let key = (identity.clone(), audience.clone());
        let now = unix_seconds(SystemTime::now());
        let (held, request) = {
            let mut state = self.lock();
            let held = state
                .held
                .get(&key)
                .filter(|held| held.expires > now)
                .cloned();
            if let Some(held) = &held
                && held.renew > now
            {
                return Ok(held.token.clone());
            }
            (held, self.request(&mut state, &key))
        };
        let answer = match &request {
            Ok(request) => request.clone().await,
            Err(error) => Err(error.clone()),
        };
        // The request is dropped after this: until the token is held, whoever asks for it finds the request.
        let mut state = self.lock();
        let unsupported = |error: &&IssueError| error.code == Code::Unimplemented;
        state.unsupported = answer.as_ref().err().filter(unsupported).cloned();
        match answer {
            Ok(new) => {
                state.hold(key, new.clone(), now);
                Ok(new.token)
            }
            // This holds for the token that is kept, too.
            Err(error) if error.code == Code::PermissionDenied => {
                state.held.remove(&key);
                Err(status(error))
            }
            Err(error) => held.map(|held| held.token).ok_or_else(|| status(error)),
        }
    }
}

/// Returns what the app is told. That its node or the CA has a problem is no concern of the app.
fn status(error: IssueError) -> Status {
    let code = match error.code {
        code @ (Code::PermissionDenied | Code::ResourceExhausted | Code::Unimplemented) => code,
        _ => Code::Unavailable,
    };
    Status::new(code, error.why)
}

impl fmt::Debug for JwtSvids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtSvids").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        time::Duration,
    };

    use futures_util::future::join_all;
    use rcgen::KeyPair;

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
        /// What it answers instead, if it is not `Ok`.
        code: Mutex<Code>,
        requests: AtomicU64,
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
                self.requests.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(1)).await;
                let code = *self.code.lock().unwrap();
                if code != Code::Ok {
                    let why = "no".to_owned();
                    return Err(IssueError { code, ..why.into() });
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
            code: Code::Ok.into(),
            requests: 0.into(),
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
        *ca.code.lock().unwrap() = Code::Unavailable;
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
    async fn those_who_ask_at_once_wait_for_one_request() {
        let (ca, jwts) = set();
        let (web, db) = (web(), db());
        let answers = join_all((0..100).map(|_| jwts.issue(&web, &db))).await;
        let tokens: Result<Vec<_>, _> = answers.into_iter().collect();
        assert!(tokens.unwrap().windows(2).all(|two| two[0] == two[1]));
        assert_eq!(ca.requests.load(Ordering::Relaxed), 1);
        // One that is given up does not stop those after it.
        let other = Audience::try_from(vec!["other".to_owned()]).unwrap();
        assert!(jwts.issue(&web, &other).now_or_never().is_none());
        jwts.issue(&web, &other).await.unwrap();
        assert_eq!(ca.requests.load(Ordering::Relaxed), 3);
        assert_eq!(jwts.lock().requests.len(), 1);
    }

    #[tokio::test]
    async fn refusals_say_what_the_app_can_do() {
        let (ca, jwts) = set();
        for (answered, expected) in [
            (Code::PermissionDenied, Code::PermissionDenied),
            (Code::Unauthenticated, Code::Unavailable),
            (Code::Internal, Code::Unavailable),
            (Code::Unimplemented, Code::Unimplemented),
        ] {
            *ca.code.lock().unwrap() = answered;
            let refused = jwts.issue(&web(), &db()).await.unwrap_err();
            assert_eq!(refused.code(), expected);
        }
        let burst = u64::from(BURST.get());
        for _ in 0..burst {
            let refused = jwts.issue(&web(), &db()).await.unwrap_err();
            assert_eq!(refused.code(), Code::Unimplemented);
        }
        assert!(ca.requests.load(Ordering::Relaxed) <= burst + 1);
    }

    #[tokio::test]
    async fn a_token_is_not_used_once_the_ca_denies_another() {
        let (ca, jwts) = set();
        let now = unix_seconds(SystemTime::now());
        let held = Held {
            token: "held".into(),
            renew: now,
            expires: now + 100,
        };
        jwts.lock().hold((web(), db()), held, now);
        *ca.code.lock().unwrap() = Code::Unavailable;
        assert_eq!(jwts.issue(&web(), &db()).await.unwrap(), "held");
        *ca.code.lock().unwrap() = Code::PermissionDenied;
        let denied = jwts.issue(&web(), &db()).await.unwrap_err();
        assert_eq!(denied.code(), Code::PermissionDenied);
        assert!(jwts.lock().held.is_empty());
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
            jwts.lock().hold((web(), audience), held, now);
        }
        let held = &jwts.lock().held;
        assert_eq!(held.len(), MAX_HELD);
        assert!(
            held.values()
                .all(|held| held.expires > now + MAX_HELD as u64)
        );
    }
}
