"""Jobs, results, attempts, pauses; runs of a backfill with files, targets, questions, candidates."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

STATES = "'queued', 'running', 'succeeded', 'failed', 'cancelled', 'expired', 'dead'"
FINAL = "'succeeded', 'failed', 'cancelled', 'expired', 'dead'"
BIG = sql.BigInteger().with_variant(sql.Integer, "sqlite")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "jobs",
        sql.Column("id", sql.String(36), primary_key=True),
        sql.Column("tenant", sql.String(64), nullable=False, server_default="default"),
        sql.Column("kind", sql.String(16), nullable=False),
        sql.Column("model", sql.String(64), nullable=False),
        sql.Column("queue", sql.String(128), nullable=False),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("priority", sql.SmallInteger, nullable=False),
        sql.Column("schema_version", sql.Integer, nullable=False),
        sql.Column("payload", sql.Text, nullable=False),
        sql.Column("content_sha256", sql.String(64)),
        sql.Column("attempt", sql.Integer, nullable=False, server_default="0"),
        sql.Column("crash_count", sql.Integer, nullable=False, server_default="0"),
        sql.Column("max_attempts", sql.Integer, nullable=False),
        sql.Column("lease_id", sql.String(36)),
        sql.Column("lease_until", sql.Double),
        sql.Column("worker_id", sql.String(255)),
        sql.Column("run_at", sql.Double, nullable=False),
        sql.Column("expires_at", sql.Double),
        sql.Column("deadline", sql.Double),
        sql.Column("cancel_requested_at", sql.Double),
        sql.Column("published_at", sql.Double),
        sql.Column("publish_no", sql.Integer, nullable=False, server_default="0"),
        sql.Column("idempotency_key", sql.String(255)),
        sql.Column("batch_id", sql.String(64)),
        sql.Column("run_id", sql.String(64)),
        sql.Column("custom_id", sql.String(512)),
        sql.Column("lane", sql.Text, nullable=False),
        sql.Column("generation", sql.Integer, nullable=False, server_default="0"),
        sql.Column("labels", sql.Text, nullable=False, server_default="{}"),
        sql.Column("error_code", sql.String(64)),
        sql.Column("error_message", sql.Text),
        sql.Column("created_at", sql.Double, nullable=False),
        sql.Column("started_at", sql.Double),
        sql.Column("finished_at", sql.Double),
        sql.UniqueConstraint("tenant", "idempotency_key", name="uq_jobs_tenant_idempotency_key"),
        sql.CheckConstraint(f"state IN ({STATES})", name="ck_jobs_state"),
        sql.CheckConstraint("priority BETWEEN 0 AND 9", name="ck_jobs_priority"),
        sql.CheckConstraint("attempt >= 0 AND attempt <= max_attempts", name="ck_jobs_attempt"),
        sql.CheckConstraint(
            "(state = 'running') = (lease_id IS NOT NULL AND lease_until IS NOT NULL)", name="ck_jobs_lease"
        ),
        sql.CheckConstraint(f"(state IN ({FINAL})) = (finished_at IS NOT NULL)", name="ck_jobs_finished"),
    )
    _partial_index("ix_jobs_lanes", ["queue", "priority", "lane", "id", "run_at"], "state = 'queued'")
    hinted = "state = 'queued' AND published_at IS NOT NULL"
    _partial_index("ix_jobs_hinted", ["queue", "published_at", "lane"], hinted)
    _partial_index("ix_jobs_queued_expires", ["expires_at"], "state = 'queued'")
    _partial_index("ix_jobs_queued_deadline", ["deadline"], "state = 'queued'")
    _partial_index("ix_jobs_running_lease", ["lease_until"], "state = 'running'")
    _partial_index("ix_jobs_finished", ["state", "id"], "finished_at IS NOT NULL")
    _partial_index("ix_jobs_finished_at", ["finished_at"], "finished_at IS NOT NULL")
    _partial_index("ix_jobs_batch", ["batch_id", "id"], "batch_id IS NOT NULL")

    op.create_table(
        "results",
        sql.Column("job_id", sql.String(36), sql.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sql.Column("attempt", sql.Integer, nullable=False),
        sql.Column("payload", sql.Text, nullable=False),
        sql.Column("model", sql.String(64), nullable=False),
        sql.Column("prompt_tokens", sql.Integer, nullable=False),
        sql.Column("completion_tokens", sql.Integer, nullable=False),
        sql.Column("finish_reason", sql.String(16), nullable=False),
        sql.Column("created_at", sql.Double, nullable=False),
    )

    op.create_table(
        "attempts",
        sql.Column(
            "id",
            sql.BigInteger().with_variant(sql.Integer, "sqlite"),
            primary_key=True,
            autoincrement=True,
        ),
        sql.Column("job_id", sql.String(36), sql.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
        sql.Column("attempt", sql.Integer, nullable=False),
        sql.Column("lease_id", sql.String(36), nullable=False),
        sql.Column("worker_id", sql.String(255), nullable=False),
        sql.Column("started_at", sql.Double, nullable=False),
        sql.Column("ended_at", sql.Double, nullable=False),
        sql.Column("outcome", sql.String(16), nullable=False),
        sql.Column("error_code", sql.String(64)),
        sql.Column("error_message", sql.Text),
        sql.UniqueConstraint("lease_id", name="uq_attempts_lease_id"),
    )
    op.create_index("ix_attempts_job", "attempts", ["job_id", "id"])

    op.create_table(
        "pauses",
        sql.Column("scope", sql.String(16), primary_key=True),
        sql.Column("name", sql.String(128), primary_key=True),
        sql.Column("reason", sql.Text, nullable=False),
        sql.Column("since", sql.Double, nullable=False),
        sql.CheckConstraint("scope IN ('queue', 'batch', 'run', 'tenant')", name="ck_pauses_scope"),
    )

    op.create_table(
        "backfill_runs",
        sql.Column("id", sql.String(36), primary_key=True),
        sql.Column("root", sql.LargeBinary, nullable=False),
        sql.Column("model", sql.String(64), nullable=False),
        sql.Column("options", sql.Text, nullable=False),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("created_at", sql.Double, nullable=False),
        sql.Column("finished_at", sql.Double),
        sql.CheckConstraint(
            "state IN ('planning', 'running', 'done', 'stopped')", name="ck_backfill_runs_state"
        ),
        sql.CheckConstraint(
            "state = 'running' OR (state IN ('done', 'stopped')) = (finished_at IS NOT NULL)",
            name="ck_backfill_runs_finished",
        ),
    )

    op.create_table(
        "backfill_files",
        sql.Column("id", BIG, primary_key=True, autoincrement=True),
        sql.Column(
            "run_id", sql.String(36), sql.ForeignKey("backfill_runs.id", ondelete="CASCADE"), nullable=False
        ),
        sql.Column("path", sql.LargeBinary, nullable=False),
        sql.Column("sha256", sql.String(64), nullable=False),
        sql.Column("encoding", sql.Text),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("reason", sql.Text),
        sql.Column("exchange", sql.Integer, nullable=False),
        sql.Column("documented", sql.Integer, nullable=False),
        sql.Column("passed_over", sql.Text, nullable=False),
        sql.Column("targets", sql.Integer, nullable=False),
        sql.Column("accepted", sql.Integer, nullable=False, server_default="0"),
        sql.Column("rejected", sql.Integer, nullable=False, server_default="0"),
        sql.Column("questions", sql.Integer, nullable=False, server_default="0"),
        sql.Column("tokens", sql.BigInteger, nullable=False, server_default="0"),
        sql.UniqueConstraint("run_id", "path", name="uq_backfill_files_path"),
        sql.CheckConstraint(
            "state IN ('planned', 'asked', 'done', 'skipped', 'changed', 'applied', 'committed')",
            name="ck_backfill_files_state",
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_backfill_files_state", "backfill_files", ["run_id", "state", "path"])

    op.create_table(
        "backfill_targets",
        sql.Column("id", BIG, primary_key=True, autoincrement=True),
        sql.Column("file_id", BIG, sql.ForeignKey("backfill_files.id", ondelete="CASCADE"), nullable=False),
        sql.Column("place", sql.Integer, nullable=False),
        sql.Column("name", sql.Text, nullable=False),
        sql.Column("twin", sql.Integer, nullable=False),
        sql.Column("line", sql.Integer, nullable=False),
        sql.Column("kind", sql.String(16), nullable=False),
        sql.Column("code_sha256", sql.String(64), nullable=False),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("text", sql.Text),
        sql.Column("reason", sql.Text),
        sql.Column("score", sql.Double),
        sql.Column("exchange", sql.Integer, nullable=False, server_default="-1"),
        sql.UniqueConstraint("file_id", "place", name="uq_backfill_targets_place"),
        sql.CheckConstraint("state IN ('open', 'accepted', 'rejected')", name="ck_backfill_targets_state"),
        sql.CheckConstraint("(state = 'accepted') = (text IS NOT NULL)", name="ck_backfill_targets_text"),
        sqlite_autoincrement=True,
    )

    op.create_table(
        "backfill_questions",
        sql.Column("file_id", BIG, sql.ForeignKey("backfill_files.id", ondelete="CASCADE"), primary_key=True),
        sql.Column("exchange", sql.Integer, primary_key=True),
        sql.Column("target_id", sql.BigInteger, primary_key=True),
        sql.Column("number", sql.Integer, primary_key=True),
        sql.Column("job_id", sql.String(36), nullable=False),
    )

    op.create_table(
        "backfill_candidates",
        sql.Column(
            "target_id", BIG, sql.ForeignKey("backfill_targets.id", ondelete="CASCADE"), primary_key=True
        ),
        sql.Column("exchange", sql.Integer, primary_key=True),
        sql.Column("number", sql.Integer, primary_key=True),
        sql.Column("place", sql.Integer, primary_key=True),
        sql.Column("text", sql.Text, nullable=False),
        sql.Column("seed", sql.BigInteger, nullable=False),
        sql.Column("tokens", sql.Integer, nullable=False),
        sql.Column("logprob", sql.Double),
        sql.Column("reason", sql.Text),
        sql.Column("score_parts", sql.Text, nullable=False),
    )


def _partial_index(name: str, columns: list[str], where: str) -> None:
    condition = sql.text(where)
    op.create_index(name, "jobs", columns, sqlite_where=condition, postgresql_where=condition)
