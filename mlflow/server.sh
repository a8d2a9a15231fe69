#!/bin/sh
# Start a tracking server that several people or machines share. For one person on one machine: `clplat ui`.
#
#   mlflow/server.sh                                            SQLite in ./mlflow-server, this machine only
#   STORE=postgresql+psycopg://user:password@host/mlflow mlflow/server.sh
#   HOST=0.0.0.0 ALLOWED_HOSTS=tracking.example.org mlflow/server.sh      beyond this machine, because asked
#
# STORE wants a driver: `pip install 'psycopg[binary]'`; a plain postgresql:// means psycopg 3 from SQLAlchemy 2.1 on.
# Other variables: PORT (5000), FOLDER (./mlflow-server: database and artifacts), WORKERS (1; 250 MB each).
set -eu

host=${HOST:-127.0.0.1}
port=${PORT:-5000}
folder=${FOLDER:-./mlflow-server}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
store=${STORE:-sqlite:///$folder/mlflow.db}

case $host in
127.* | localhost | ::1) ;;
*)
    echo "server.sh: listening on $host: whoever reaches this machine can read and change the store" >&2
    echo "server.sh: MLflow asks for no password here; put a reverse proxy that does in front of it" >&2
    ;;
esac

set -- --backend-store-uri "$store" --artifacts-destination "$folder/artifacts" \
    --host "$host" --port "$port" --workers "${WORKERS:-1}"
if [ -n "${ALLOWED_HOSTS:-}" ]; then
    set -- "$@" --allowed-hosts "$ALLOWED_HOSTS"
fi

# Nothing here uses the job runner (235 MB), and nothing is reported to anyone.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
exec "${PYTHON:-python}" -m mlflow server "$@"
