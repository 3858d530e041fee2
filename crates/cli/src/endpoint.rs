//! Connections to running nodes.

use std::time::Duration;

use clap::Args;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::Failure;

/// Which nodes to ask, named as in etcdctl.
#[derive(Args, Clone, Debug)]
pub struct EndpointArguments {
    /// Client addresses, separated by commas
    #[arg(long, env = "ETCDCTL_ENDPOINTS", default_value = "http://127.0.0.1:2379", value_delimiter = ',')]
    pub endpoints: Vec<String>,
    /// Trust servers whose certificate this authority signed (PEM file)
    #[arg(long, env = "ETCDCTL_CACERT")]
    cacert: Option<std::path::PathBuf>,
    /// This client's certificate (PEM file)
    #[arg(long, env = "ETCDCTL_CERT", requires = "key")]
    cert: Option<std::path::PathBuf>,
    /// This client's private key (PEM file)
    #[arg(long, env = "ETCDCTL_KEY", requires = "cert")]
    key: Option<std::path::PathBuf>,
    /// How long to wait for an answer, in seconds
    #[arg(long, default_value_t = 5)]
    command_timeout: u64,
}

impl EndpointArguments {
    /// A connection to one of the endpoints.
    pub async fn connect(&self, endpoint: &str) -> Result<Channel, Failure> {
        let url = if endpoint.contains("://") { endpoint.to_owned() } else { format!("http://{endpoint}") };
        let bad = |error: &dyn std::fmt::Display| Failure::usage(format!("{endpoint}: {error}"));
        let mut target = Endpoint::from_shared(url.clone())
            .map_err(|error| bad(&error))?
            .connect_timeout(self.timeout())
            .timeout(self.timeout());
        if url.starts_with("https://") {
            target = target.tls_config(self.tls()?).map_err(|error| bad(&error))?;
        }
        target.connect().await.map_err(|error| {
            let mut cause: &dyn std::error::Error = &error;
            while let Some(source) = cause.source() {
                cause = source;
            }
            Failure::unreachable(format!(
                "{endpoint} cannot be reached: {cause}; is a node serving there? (--endpoints)"
            ))
        })
    }

    /// The first endpoint that can be reached.
    pub async fn connect_any(&self) -> Result<Channel, Failure> {
        let mut last = Failure::usage("no endpoint was given (--endpoints)");
        for endpoint in &self.endpoints {
            match self.connect(endpoint).await {
                Ok(channel) => return Ok(channel),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.command_timeout)
    }

    fn tls(&self) -> Result<ClientTlsConfig, Failure> {
        let read = |path: &std::path::Path| {
            std::fs::read(path).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))
        };
        let mut tls = ClientTlsConfig::new();
        if let Some(authority) = &self.cacert {
            tls = tls.ca_certificate(Certificate::from_pem(read(authority)?));
        }
        if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
            tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        Ok(tls)
    }
}

/// A node's answer that is an error, as ours.
pub fn refused(status: &tonic::Status) -> Failure {
    match status.code() {
        tonic::Code::Unavailable | tonic::Code::DeadlineExceeded => Failure::unreachable(status.message()),
        _ => Failure::failed(status.message()),
    }
}
