//! Plain HTTP on the client port: what probes and Prometheus ask for.
//!
//! | path | answer |
//! |---|---|
//! | `/health?exclude=&serializable=` | `{"health":"true","reason":""}`, or 503 and the reason |
//! | `/livez`, `/readyz`, each check below them | `ok`; `?verbose` lists the checks, `?exclude=` leaves one out |
//! | `/version` | versions of server, cluster and storage |
//! | `/metrics` | Prometheus |
//!
//! Source: etcd server/etcdserver/api/etcdhttp.

mod health;
mod metrics;

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Response, StatusCode, Uri};

use crate::rpc::{Body, Services};

/// Answers one request.
pub(crate) async fn handle(services: &Arc<Services>, method: &Method, uri: &Uri) -> Response<Body> {
    let known = matches!(uri.path(), "/health" | "/version" | "/metrics")
        || ["/livez", "/readyz"].iter().any(|root| uri.path() == *root || uri.path().starts_with(&format!("{root}/")));
    if !known {
        return text(StatusCode::NOT_FOUND, "404 page not found\n");
    }
    if method != Method::GET {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
        return response;
    }
    let query = Query::new(uri.query().unwrap_or_default());
    match uri.path() {
        "/health" => health::health(services, &query).await,
        "/version" => version(services),
        "/metrics" => {
            let mut response = text(StatusCode::OK, metrics::render(services));
            let format = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            response.headers_mut().insert(CONTENT_TYPE, format);
            response
        }
        path => health::checks(services, path, &query).await,
    }
}

fn version(services: &Services) -> Response<Body> {
    let server = &services.options.etcd_version;
    let cluster = services.options.cluster_version();
    let storage = services.options.storage_version();
    let json = serde_json::json!({ "etcdserver": server, "etcdcluster": cluster, "storage": storage });
    self::json(StatusCode::OK, json.to_string())
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    respond(status, "text/plain; charset=utf-8", body)
}

fn json(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    respond(status, "application/json", body)
}

fn respond(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::Plain(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// The part of a URL after `?`. The names and values that are looked for need no percent-encoding.
struct Query<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Query<'a> {
    fn new(query: &'a str) -> Query<'a> {
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        Query(pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).collect())
    }

    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(key, _)| *key == name)
    }

    /// All that is not empty under this name.
    fn all(&self, name: &str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(key, value)| *key == name && !value.is_empty()).map(|(_, value)| *value)
    }
}
